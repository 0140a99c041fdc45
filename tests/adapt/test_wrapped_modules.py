"""Blocks wrapped by torch after or before ``adapt_model``, and models that were cut: modules count, not their names."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils import prune

from rlrr_kernels import (
    RLRRConfig,
    adapt_model,
    adapt_report,
    check_gradients,
    is_adapted,
    load_adapter,
    merge_adapter,
    parameter_groups,
    recompute_activations,
    save_adapter,
)
from rlrr_kernels.adapt.modules import find_module, named_modules, named_tensors
from tests.support.tiny_models import backward, disturb, tiny_images, tiny_model

pytest.importorskip("safetensors", reason="needs safetensors, of the extra [models]")


def compile_blocks(model: nn.Module) -> None:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")


def compile_layers(model: nn.Module) -> None:
    for block in model.blocks:
        block.attn.qkv = torch.compile(block.attn.qkv, backend="eager")
        block.norm1 = torch.compile(block.norm1, backend="eager")


def checkpoint_blocks(model: nn.Module) -> None:
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "Block")


def compile_checkpointed_blocks(model: nn.Module) -> None:
    checkpoint_blocks(model)
    compile_blocks(model)


def distribute_blocks(model: nn.Module) -> None:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = nn.parallel.DistributedDataParallel(block)


def shard_blocks(model: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for i, block in enumerate(model.blocks):
        model.blocks[i] = FullyShardedDataParallel(block, use_orig_params=True, device_id=torch.device("cpu"))


LOCAL = (compile_blocks, compile_layers, checkpoint_blocks, compile_checkpointed_blocks)
ALL = (*LOCAL, distribute_blocks, shard_blocks)


def adapted(**config) -> nn.Module:
    model = tiny_model("vit")
    adapt_model(model, RLRRConfig(**{"recipe": "paper", **config}))
    torch.manual_seed(0)
    disturb(model)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for group in parameter_groups(model, 1e-3, 0.1) for p in group["params"]]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def roles(model: nn.Module) -> dict[str, list[int]]:
    return {group["name"]: [id(p) for p in group["params"]] for group in parameter_groups(model, 1e-3, 0.1)}


@pytest.mark.parametrize("wrap", ALL)
def test_optimizer_groups_stay_the_same(wrap: Callable[[nn.Module], None], process_group):
    model = adapted()
    before = roles(model)
    assert {name: len(parameters) for name, parameters in before.items()} == {"decay": 19, "no_decay": 19}
    twin, images = copy.deepcopy(model), tiny_images("vit")
    if wrap is shard_blocks:
        recompute_activations(model)
    wrap(model)
    assert roles(model) == before
    with torch.no_grad():
        torch.testing.assert_close(model(images), twin(images))
    for one in (model, twin):
        backward(one, images)
    check_gradients(model)
    for ours, plain in zip(trained(model), trained(twin), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("wrap", ALL)
def test_files_have_plain_names(wrap, process_group, tmp_path):
    model, images = adapted(), tiny_images("vit")
    model.blocks[0].extra = nn.Parameter(torch.ones(1))  # something of the user's, in a wrapped block
    report = adapt_report(model)
    expected = model(images)
    save_adapter(model, tmp_path / "plain")
    wrap(model)
    if wrap is shard_blocks:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with pytest.raises(ValueError, match=r"weights of blocks\.0 are sharded .*summon_full_params\(model\)"):
            save_adapter(model, tmp_path / "sharded")
        with FullyShardedDataParallel.summon_full_params(model):
            save_adapter(model, tmp_path / "wrapped")
    else:
        save_adapter(model, tmp_path / "wrapped")
    assert contents(tmp_path / "wrapped") == contents(tmp_path / "plain")
    assert adapt_report(model) == report
    fresh = tiny_model("vit")
    fresh.blocks[0].extra = nn.Parameter(torch.zeros(1))
    load_adapter(fresh, tmp_path / "wrapped")
    assert torch.equal(fresh(images), expected)
    assert torch.equal(fresh.blocks[0].extra, torch.ones(1))


@pytest.mark.parametrize("wrap", LOCAL)
def test_wrapped_before_and_merged_inside(wrap, tmp_path):
    images = tiny_images("vit")
    save_adapter(model := adapted(), tmp_path)
    expected, report = model(images), adapt_report(model)
    wrapped = tiny_model("vit")
    wrap(wrapped)
    before = [type(module).__name__ for module in wrapped.modules()]
    assert load_adapter(wrapped, tmp_path) == report
    torch.testing.assert_close(wrapped(images), expected)
    load_adapter(wrapped, tmp_path)  # into the adapted one
    assert recompute_activations(wrapped) == recompute_activations(model)
    torch.testing.assert_close(wrapped(images), expected)

    assert merge_adapter(wrapped).gained == ()
    torch.testing.assert_close(wrapped(images), expected, rtol=1e-4, atol=1e-4)
    assert [type(module).__name__ for module in wrapped.modules()] == before
    plain = tiny_model("vit", seed=1)
    plain.load_state_dict(dict(named_tensors(wrapped)))
    torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrap", [distribute_blocks, shard_blocks])
def test_what_would_not_exchange_new_parameters_is_refused_by_name(wrap, process_group, tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    model = tiny_model("vit")
    wrap(model)
    for change in (lambda: adapt_model(model), lambda: load_adapter(model, tmp_path / "adapter")):
        with pytest.raises(ValueError, match=r"blocks\.0, blocks\.1 is wrapped by .*adapt the model first"):
            change()
    assert not is_adapted(model)


def test_pieces_of_parameters_are_not_taken_for_these(process_group):
    """Of several processes each has a piece of FSDP1's parameters, of one dimension, or nothing."""
    model = adapted()
    shard_blocks(model)
    backward(model, tiny_images("vit"))
    layers = [name for name, _ in named_modules(model) if name.endswith("fc1")]
    for name, pieces in zip(layers, ((4, 7), (0, 0)), strict=True):
        layer = find_module(model, name)
        for key, size in zip(("scale_row", "scale_col"), pieces, strict=True):
            layer._parameters[key] = nn.Parameter(torch.ones(size))
            if size:
                layer._parameters[key].grad = torch.ones(size)
    check_gradients(model)
    with pytest.raises(ValueError, match=r"weights of blocks\.0 are sharded by FullyShardedDataParallel"):
        adapt_report(model)


def test_sharded_weights_are_not_merged_and_nothing_is_loaded(process_group, tmp_path):
    save_adapter(adapted(), tmp_path)
    model = adapted()
    shard_blocks(model)
    with pytest.raises(ValueError, match=r"weights of blocks\.0 are sharded .*summon_full_params\(model\)"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"sharded by FSDP cannot be merged in place: blocks\.0, blocks\.1"):
        merge_adapter(model)
    assert is_adapted(model)


def test_fully_sharded_models_are_saved_whole_and_nothing_else(process_group, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = adapted()
    save_adapter(model, tmp_path / "plain")
    report = adapt_report(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # also gives the model another class
    assert adapt_report(model) == report
    save_adapter(model, tmp_path / "sharded")
    assert contents(tmp_path / "sharded") == contents(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"sharded by FSDP cannot be merged in place: blocks\.0\.attn\.qkv"):
        merge_adapter(model)
    with pytest.raises(ValueError, match="model is sharded by FSDP; load the adapter first"):
        load_adapter(model, tmp_path / "plain")
    fresh = tiny_model("vit")
    for block in fresh.blocks:
        fully_shard(block, mesh=mesh)
    with pytest.raises(ValueError, match=r"its weight is a DTensor of torch\.float32"):
        adapt_model(fresh)


def test_names_of_the_model_s_own_are_kept():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.Linear(4, 4))  # called as DDP calls what it wraps

        def forward(self, x):
            return self.module(x)

    model = Model()
    assert [name for name, _ in named_modules(model)] == ["", "module", "module.0"]
    report = adapt_model(model)
    assert [layer.name for layer in report.layers] == ["module.0"]
    assert find_module(nn.DataParallel(model), "module.0") is model.module[0]
    with pytest.raises(AttributeError, match=r"Model has no module module\.1\.x"):
        find_module(model, "module.1.x")


def test_files_that_hold_names_of_wrappers_load(tmp_path):
    """As versions wrote them that took the names of a compiled block's parameters."""
    import json

    from safetensors.torch import load_file, save_file

    model, images = adapted(), tiny_images("vit")
    save_adapter(model, tmp_path)
    tensors, document = load_file(tmp_path / "adapter.safetensors"), json.loads((tmp_path / "config.json").read_text())
    del document["digest"], document["tensor_digests"]
    doubled = {n.replace("blocks.0.", "blocks.0._orig_mod."): t.clone() for n, t in tensors.items() if "blocks.0." in n}
    document["also_trained"] = list(doubled)
    save_file(tensors | doubled, tmp_path / "adapter.safetensors", {"rlrr_config": json.dumps(document)})
    (tmp_path / "config.json").write_text(json.dumps(document))
    fresh = tiny_model("vit")
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(images), model(images))


# ---------------------------------------------------------------- cut and changed after adapting


def test_a_pruned_model_saves_loads_merges_and_reports(tmp_path):
    model, images = adapted(), tiny_images("vit")
    model.prune_intermediate_layers([0], prune_norm=True, prune_head=True)
    report = adapt_report(model)
    assert [layer.name for layer in report.layers] == [
        f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert (report.norms, report.tokens, report.heads) == (("blocks.0.norm1", "blocks.0.norm2"), "patch_embed.norm", ())
    assert report.adapter == sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = model.forward_features(images)
    save_adapter(model, tmp_path)
    fresh = tiny_model("vit")
    fresh.prune_intermediate_layers([0], prune_norm=True, prune_head=True)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.forward_features(images), expected)
    merge_adapter(model)
    torch.testing.assert_close(model.forward_features(images), expected, rtol=1e-4, atol=1e-4)
    assert not is_adapted(model)


def test_layers_are_known_by_what_they_are_after_blocks_moved(tmp_path):
    model, images = adapted(), tiny_images("vit")
    first, second = model.blocks
    model.blocks = nn.Sequential(second, first)
    expected = model(images)
    save_adapter(model, tmp_path)
    fresh = tiny_model("vit")
    fresh.blocks = nn.Sequential(fresh.blocks[1], fresh.blocks[0])
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(images), expected)
    twin = copy.deepcopy(model)
    merge_adapter(twin)
    torch.testing.assert_close(twin(images), expected, rtol=1e-4, atol=1e-4)


def test_a_new_head_takes_the_place_of_the_old(tmp_path):
    model, images = adapted(), tiny_images("vit")
    model.reset_classifier(7)
    assert adapt_report(model).heads == ("head",)
    assert adapt_report(model).head == 7 * 48 + 7
    save_adapter(model, tmp_path)
    fresh = tiny_model("vit")
    fresh.reset_classifier(7)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(images), model(images))


def test_a_layer_put_in_by_hand_is_left_out(tmp_path):
    model, images = adapted(), tiny_images("vit")
    model.blocks[0].attn.proj = model.blocks[0].attn.proj.to_linear()
    expected = model(images)
    assert len(adapt_report(model).layers) == 7
    merge_adapter(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
def test_computed_scales_are_refused_by_name(how: str, tmp_path):
    """Their roles and names are others': weight decay would be lost, and the file load nowhere."""
    model = adapted()
    layer = model.blocks[1].attn.qkv
    if how == "pruned":
        prune.l1_unstructured(layer, "scale_row", 0.5)
    else:
        nn.utils.parametrize.register_parametrization(layer, "scale_row", nn.Tanh())
    for use in (lambda: parameter_groups(model, 1e-3, 0.1), lambda: save_adapter(model, tmp_path / "adapter")):
        with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.scale_row is computed from another tensor"):
            use()
    assert not (tmp_path / "adapter").exists()
    if how == "pruned":
        prune.remove(layer, "scale_row")
    else:
        nn.utils.parametrize.remove_parametrizations(layer, "scale_row")
    images = tiny_images("vit")
    expected = model(images)
    save_adapter(model, tmp_path / "adapter")
    assert {name: len(ids) for name, ids in roles(model).items()} == {"decay": 19, "no_decay": 19}
    fresh = tiny_model("vit")
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(images), expected)


def test_an_average_of_a_model_is_known(tmp_path):
    model = adapted()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert {name: len(ids) for name, ids in roles(average).items()} == {"decay": 19, "no_decay": 19}
    save_adapter(average, tmp_path / "adapter")
    fresh = tiny_model("vit")
    load_adapter(fresh, tmp_path / "adapter")
    images = tiny_images("vit")
    torch.testing.assert_close(fresh(images), average(images))
