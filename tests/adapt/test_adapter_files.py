"""Adapter folders: what is in them, that a failed save destroys nothing, and that nothing wrong is loaded."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
import torch
from torch import nn

from rlrr_kernels import RLRRConfig, adapt_model, adapter_info, is_adapted, load_adapter, merge_adapter, save_adapter
from rlrr_kernels.adapt.folder.files import _document_digest, _tensor_digest
from tests.support.paths import ROOT
from tests.support.tiny_models import SIZES, disturb, tiny_images, tiny_model

pytest.importorskip("safetensors", reason="needs safetensors, of the extra [models]")

FILES = {"adapter.safetensors", "config.json", "README.md"}


def trained(family="vit", seed=0, **config):
    model = tiny_model(family)
    adapt_model(model, RLRRConfig(**{"recipe": "paper", **config}))
    torch.manual_seed(seed)
    disturb(model)
    return model


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("family", SIZES)
def test_a_fresh_backbone_gives_equal_logits(family, tmp_path):
    recipe = "paper" if family not in ("convnext", "swinv2") else None
    model, images = trained(family, recipe=recipe, rank=2), tiny_images(family)
    assert save_adapter(model, tmp_path / "adapter") == tmp_path / "adapter"
    fresh = tiny_model(family)
    report = load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(images), model(images))
    assert report.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    again = trained(family, seed=1, recipe=recipe, rank=2)
    load_adapter(again, str(tmp_path / "adapter"))
    assert torch.equal(again(images), model(images))


def test_holds_trained_tensors_only_and_a_schema_version(tmp_path):
    from safetensors.torch import load_file

    model = trained()
    metadata = {"classes": ["a", "b"], "accuracy": 0.9}
    save_adapter(model, tmp_path, metadata=metadata)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert set(tensors) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(tensors[name], model.get_parameter(name)) for name in tensors)
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["schema_version"] == 1
    info = adapter_info(tmp_path)
    assert info.config == RLRRConfig(recipe="paper")
    assert info.metadata == metadata
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"  # without the tag, timm could take other weights one day
    assert info.base_model == {"class": "VisionTransformer", "name": name, "num_classes": 5}
    card = (tmp_path / "README.md").read_text()
    for part in (
        "library_name: rlrr-kernels",
        f'timm.create_model("{name}", pretrained=True, num_classes=5)',
        "load_adapter(model",
        "trained parameters",
        "0.9",
    ):
        assert part in card


def test_what_a_user_unfroze_is_kept_too(tmp_path):
    model, images = trained(), tiny_images("vit")
    model.cls_token.requires_grad_(True)
    disturb(model)
    save_adapter(model, tmp_path)
    fresh = tiny_model("vit")
    load_adapter(fresh, tmp_path)
    assert fresh.cls_token.requires_grad
    assert torch.equal(fresh(images), model(images))


def test_wrapped_models_save_under_plain_names(tmp_path):
    model = trained()
    save_adapter(torch.compile(model, backend="eager"), tmp_path / "compiled")
    save_adapter(nn.DataParallel(model), tmp_path / "parallel")
    save_adapter(model, tmp_path / "plain")
    assert contents(tmp_path / "compiled") == contents(tmp_path / "parallel") == contents(tmp_path / "plain")


def test_a_merged_layer_follows_what_is_loaded(tmp_path):
    model, images = trained(), tiny_images("vit")
    save_adapter(model, tmp_path)
    other = trained(seed=1)
    other.blocks[0].attn.qkv.merge()
    load_adapter(other, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(other(images), model(images))


def test_saving_again_replaces_the_adapter_and_leaves_other_files(tmp_path):
    save_adapter(trained(seed=0), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    model = trained(seed=1)
    save_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "notes.txt"}
    fresh, images = tiny_model("vit"), tiny_images("vit")
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(images), model(images))


# ---------------------------------------------------------------- saves that fail


def test_no_space_left_keeps_the_old_adapter(tmp_path, monkeypatch):
    save_adapter(trained(seed=0), tmp_path / "adapter")
    before = contents(tmp_path / "adapter")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        OSError, match=r"could not be saved \(No space left on device\); one saved there before"
    ) as error:
        save_adapter(trained(seed=1), tmp_path / "adapter")
    assert error.value.errno == errno.ENOSPC
    assert contents(tmp_path / "adapter") == before
    with pytest.raises(OSError, match="No space left"):
        save_adapter(trained(seed=1), tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("successes", [0, 1, 2])
def test_failing_at_any_replacement_leaves_one_whole_adapter(successes, tmp_path, monkeypatch):
    old, images = trained(seed=0), tiny_images("vit")
    save_adapter(old, tmp_path, metadata={"run": "old"})
    replace, calls = os.replace, []

    def fail_later(source, target):
        if len(calls) == successes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_later)
        with pytest.raises(OSError, match="could not be saved"):
            save_adapter(trained(seed=1, rank=2), tmp_path, metadata={"run": "new"})
    assert {path.name for path in tmp_path.iterdir()} == FILES
    fresh = tiny_model("vit")
    if successes:
        with pytest.warns(UserWarning, match=r"config\.json differs from its copy inside adapter\.safetensors"):
            load_adapter(fresh, tmp_path)
    else:
        load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(images), old(images))


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files with setrlimit")
def test_a_real_write_error_keeps_the_old_adapter(tmp_path):
    save_adapter(trained(seed=0), tmp_path)
    before = contents(tmp_path)
    code = """
        import resource, signal, sys
        sys.path.insert(0, sys.argv[2])
        from tests.support.tiny_models import tiny_model
        from rlrr_kernels import RLRRConfig, adapt_model, save_adapter
        model = tiny_model("vit")
        adapt_model(model, RLRRConfig(recipe="paper", rank=4))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        save_adapter(model, sys.argv[1])
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(ROOT)]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert "could not be saved (File too large)" in result.stderr
    assert contents(tmp_path) == before


def test_a_save_removes_what_a_killed_one_left_an_hour_ago(tmp_path):
    left = [tmp_path / f".{name}.0a1b2c3d.tmp" for name in ("config.json", "adapter.safetensors", "README.md")]
    for path in left:
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 3700,) * 2)
    save_adapter(trained(seed=0), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "adapter.safetensors", "config.json"]


@pytest.mark.slow
def test_killing_a_save_never_leaves_half_an_adapter(tmp_path):
    code = """
        import sys
        sys.path.insert(0, sys.argv[2])
        from tests.support.tiny_models import tiny_model
        from rlrr_kernels import RLRRConfig, adapt_model, save_adapter
        model = tiny_model("vit")
        adapt_model(model, RLRRConfig(recipe="paper"))
        save_adapter(model, sys.argv[1], metadata={"round": 0})
        print("saved", flush=True)
        for i in range(1, 100_000):
            save_adapter(model, sys.argv[1], metadata={"round": i})
    """
    for _ in range(5):
        arguments = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(ROOT)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "saved\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.2 + 0.3 * torch.rand(()).item())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        load_adapter(tiny_model("vit"), tmp_path)


def test_refuses_to_save_what_has_no_values(tmp_path):
    with pytest.raises(ValueError, match="is not adapted"):
        save_adapter(tiny_model("vit"), tmp_path / "adapter")
    with torch.device("meta"):
        model = tiny_model("vit")
    adapt_model(model)
    with pytest.raises(ValueError, match="meta device"):
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(TypeError, match="metadata must hold JSON types only"):
        save_adapter(trained(), tmp_path / "adapter", metadata={"x": torch.ones(1)})
    assert not (tmp_path / "adapter").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "adapter").write_text("")
    with pytest.raises(OSError, match=r"could not be saved.*adapter"):
        save_adapter(trained(), tmp_path / "adapter")


# ---------------------------------------------------------------- loads that must not happen


def test_the_wrong_model_is_told_every_mismatch_and_left_alone(tmp_path):
    saved = trained("vit")
    save_adapter(saved, tmp_path)
    model = tiny_model("vit", depth=3, mlp_ratio=2, num_classes=7)
    before, frozen = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="does not fit this VisionTransformer") as error:
        load_adapter(model, tmp_path)
    text = str(error.value)
    shapes = {name: list(p.shape) for name, p in saved.named_parameters() if p.requires_grad}
    for i in range(2):
        assert f"shape of blocks.{i}.mlp.fc1.shift: the adapter has [192], the model needs [96]" in text
        assert f"shape of blocks.{i}.mlp.fc2.scale_col: the adapter has [1, 1, 192], the model needs [1, 1, 96]" in text
    assert f"shape of head.bias: the adapter has {shapes['head.bias']}, the model needs [7]" in text
    assert text.count("missing in the adapter: blocks.2.") == 4 * 3 + 2 * 2
    assert text.count("\n") == 2 * 3 + 2 + 4 * 3 + 2 * 2
    assert_unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert not is_adapted(model)


def test_another_kind_of_model_is_told_what_it_lacks(tmp_path):
    save_adapter(trained("vit"), tmp_path)
    with pytest.raises(ValueError, match="does not fit this ConvNeXt") as error:
        load_adapter(tiny_model("convnext"), tmp_path)
    assert "not in the model: blocks.1.mlp.fc2" in str(error.value)
    save_adapter(trained("vit", recipe=None), tmp_path)
    model = tiny_model("swin")
    before = state(model)
    with pytest.raises(ValueError, match=r"(?s)missing in the adapter: layers\.0.*not in the model: blocks\.0"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_model_adapted_otherwise_is_told_the_difference(tmp_path):
    save_adapter(trained(), tmp_path)
    model = trained(residual=False, rank=2)
    before = state(model)
    with pytest.raises(ValueError, match=r"rank: the adapter has 1, the model 2; residual: the adapter has True"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_another_checkpoint_of_the_backbone_is_noticed(tmp_path, recwarn):
    save_adapter(trained(), tmp_path)
    load_adapter(tiny_model("vit").bfloat16(), tmp_path)
    assert not [warning for warning in recwarn if "frozen weights" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"frozen weights of 8 of 8 layers differ .*is this the right checkpoint"):
        load_adapter(tiny_model("vit", seed=1), tmp_path)


def test_a_model_without_values_is_refused(tmp_path):
    save_adapter(trained(), tmp_path)
    with torch.device("meta"):
        model = tiny_model("vit")
    with pytest.raises(ValueError, match="meta device"):
        load_adapter(model, tmp_path)
    assert not is_adapted(model)


def damage(folder, name, change):
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(data))


def edit(**changes):
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


def without_digests(data):
    """What a version wrote that had no digests."""
    document = json.loads(data)
    return json.dumps({name: document[name] for name in document if "digest" not in name}).encode()


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("adapter.safetensors", lambda data: data[:-1], ValueError, "truncated or no safetensors file"),
        ("adapter.safetensors", lambda data: data[:100], ValueError, "truncated or no safetensors file"),
        ("adapter.safetensors", lambda data: b"", ValueError, "truncated or no safetensors file"),
        ("adapter.safetensors", lambda data: b"PK\3\4" * 99, ValueError, "truncated or no safetensors file"),
        (
            "adapter.safetensors",
            None,
            FileNotFoundError,
            r"has no adapter\.safetensors; it holds README\.md, config\.json",
        ),
        ("config.json", lambda data: data[:50], ValueError, r"config\.json is truncated or no JSON"),
        ("config.json", lambda data: b"\xff\xfe", ValueError, r"config\.json is truncated or no JSON"),
        ("config.json", lambda data: b"[1]", ValueError, "was not written by save_adapter"),
        ("config.json", lambda data: b'{"peft_type": "LORA"}', ValueError, "it has no schema_version"),
        ("config.json", edit(schema_version=99), ValueError, "schema_version must be 1; got 99; .*newer rlrr_kernels"),
        ("config.json", edit(schema_version="x"), ValueError, "schema_version must be 1; got 'x'"),
        ("config.json", edit(format="other"), ValueError, "format must be 'rlrr_adapter'; got 'other'"),
        ("config.json", None, FileNotFoundError, r"has no config\.json; it holds README\.md, adapter\.safetensors"),
    ],
)
def test_damaged_folders_are_refused(name, change, error, message, tmp_path):
    save_adapter(trained(), tmp_path)
    damage(tmp_path, name, change)
    model = tiny_model("vit")
    before = state(model)
    for read in (lambda: load_adapter(model, tmp_path), lambda: adapter_info(tmp_path)):
        with pytest.raises(error, match=message) as raised:
            read()
        assert str(tmp_path) in str(raised.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adaptation": {"rank": 0}}, "rank must be from 1 to 64; got 0"),
        ({"adaptation": {"alpha": 0}}, "entries this version does not know: alpha"),
        ({"adaptation": None}, "config.json"),
        ({"also_trained": 3}, "config.json"),
    ],
)
def test_a_wrong_entry_is_named(changes, message, tmp_path):
    from safetensors.torch import load_file, save_file

    save_adapter(trained(), tmp_path)
    save_file(load_file(tmp_path / "adapter.safetensors"), tmp_path / "adapter.safetensors")  # without its copy
    damage(tmp_path, "config.json", without_digests)
    damage(tmp_path, "config.json", edit(**changes))
    with pytest.raises(ValueError, match=message):
        load_adapter(tiny_model("vit"), tmp_path)
    damage(tmp_path, "config.json", lambda data: b'{"schema_version": 1, "format": "rlrr_adapter"}')
    with pytest.raises(ValueError, match="misses the entry 'adaptation'"):
        load_adapter(tiny_model("vit"), tmp_path)


def rewrite(folder, change=lambda tensors: None, digests=True, **entries):
    """Changes tensors and entries of ``config.json`` and its copy, digests included, or as if there were none."""
    from safetensors.torch import load_file, save_file

    tensors, document = load_file(folder / "adapter.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors)
    document = {name: document[name] for name in document if "digest" not in name} | entries
    if digests:
        document["tensor_digests"] = {name: _tensor_digest(tensor) for name, tensor in tensors.items()}
        document["digest"] = _document_digest(json.loads(json.dumps(document)))
    save_file(tensors, folder / "adapter.safetensors", {"rlrr_config": json.dumps(document)})
    (folder / "config.json").write_text(json.dumps(document))


def assert_refused(folder, message):
    model = tiny_model("vit")
    before, frozen = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message) as raised:
        load_adapter(model, folder)
    assert str(folder) in str(raised.value)
    assert_unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert not is_adapted(model)


def test_flipped_bits_are_named(tmp_path):
    save_adapter(trained(), tmp_path)
    path = tmp_path / "adapter.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    start, _ = json.loads(data[8 : 8 + size])["blocks.1.mlp.fc1.scale_col"]["data_offsets"]
    for flipped, message in (
        (
            8 + size + start,
            r"adapter\.safetensors is damaged: tensors without the digest .*: blocks\.1\.mlp\.fc1\.scale_col$",
        ),
        (
            data.index(b'rank\\": 1') + len(b'rank\\": '),
            r"safetensors is damaged or was edited: its settings do not have",
        ),
    ):
        damaged = bytearray(data)
        damaged[flipped] ^= 2
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that config.json differs
            assert_refused(tmp_path, message)
    path.write_bytes(data)
    load_adapter(tiny_model("vit"), tmp_path)


def test_folders_without_digests_load(tmp_path):
    model, images = trained(), tiny_images("vit")
    save_adapter(model, tmp_path)
    rewrite(tmp_path, digests=False)
    load_adapter(fresh := tiny_model("vit"), tmp_path)
    assert torch.equal(fresh(images), model(images))


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors["blocks.0.attn.qkv.scale_row"][3].fill_(float("nan")),
            r"tensors that are not finite: blocks\.0\.attn\.qkv\.scale_row$",
        ),
        (lambda tensors: tensors["head.bias"][0].fill_(float("inf")), r"tensors that are not finite: head\.bias$"),
        (
            lambda tensors: tensors.update({"blocks.0.norm1.scale": tensors["blocks.0.norm1.scale"].view(torch.int32)}),
            r"blocks\.0\.norm1\.scale must be of the kind of torch\.float32; got torch\.int32",
        ),
    ],
)
def test_values_that_no_training_leaves_are_named(change, message, digests, tmp_path):
    save_adapter(trained(), tmp_path)
    rewrite(tmp_path, change, digests)
    assert_refused(tmp_path, rf"adapter\.safetensors: {message}")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"also_trained": ["nowhere.weight"]}, r"also_trained must name tensors of adapter\.safetensors; got 'nowhere"),
        ({"also_trained": "head.bias"}, r"also_trained must be an array; got 'head\.bias'"),
        ({"also_trained": [["head.bias"]]}, r"also_trained must name tensors of adapter\.safetensors; got \[\"head"),
        ({"base_model": None}, "base_model must be an object; got null"),
        ({"metadata": [1]}, r"metadata must be an object; got \[1\]"),
        (
            {"backbone_sample": {"blocks.7.attn.qkv": [1.0] * 4}},
            r"names layers that are not in the model: blocks\.7\.attn",
        ),
        ({"backbone_sample": {"blocks.0": [1.0] * 4}}, r"names layers that are not in the model: blocks\.0$"),
        ({"backbone_sample": {"norm": [1.0]}}, r"backbone_sample must hold 4 numbers of norm; got \[1\.0\]"),
        ({"backbone_sample": {"norm": [1, None, 2, 3]}}, r"must hold 4 numbers of norm; got \[1, null, 2, 3\]"),
        ({"backbone_sample": {"norm": [10**400] * 4}}, r"must hold 4 numbers of norm; got \[10+ \.\.\."),
        ({"backbone_sample": {"norm": [float("nan")] * 4}}, r"must hold 4 numbers of norm; got \[NaN"),
        ({"backbone_sample": {"norm": [True] * 4}}, r"must hold 4 numbers of norm; got \[true"),
        ({"backbone_sample": {"norm": 3}}, "must hold 4 numbers of norm; got 3"),
        ({"backbone_sample": [1]}, "backbone_sample must be an object"),
        ({"adaptation": {"scale_dtype": ["float32"]}}, "scale_dtype must be one of"),
    ],
)
def test_entries_of_any_shape_are_named(entries, message, tmp_path):
    save_adapter(trained(), tmp_path)
    rewrite(tmp_path, **entries)
    assert_refused(tmp_path, rf"config\.json: .*{message}")


@pytest.mark.parametrize("depth", [500, 990, 100_000])
def test_nested_json_is_refused(depth, tmp_path):
    save_adapter(trained(), tmp_path)
    deep = b"[" * depth + b"]" * depth
    damage(tmp_path, "config.json", lambda data: data.replace(b'"rank": 1', b'"rank": ' + deep))
    assert (tmp_path / "config.json").stat().st_size > 2 * depth
    try:
        json.loads(deep)
    except RecursionError:  # from which depth on depends on the version of Python
        assert depth > 500
    else:
        with pytest.warns(UserWarning, match="differs from its copy"):
            load_adapter(tiny_model("vit"), tmp_path)
        rewrite(tmp_path)
    assert_refused(tmp_path, r"config\.json(: rank must be an integer| is truncated or no JSON)")


def test_what_is_not_finite_is_not_saved(tmp_path):
    model = trained()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.shift[2] = float("inf")
    with pytest.raises(ValueError, match=r"not finite cannot be saved: blocks\.1\.mlp\.fc2\.shift$"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_foreign_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_adapter(tiny_model("vit"), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="it holds nothing"):
        load_adapter(tiny_model("vit"), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json and no adapter\.safetensors; it holds adapter_c"):
        load_adapter(tiny_model("vit"), tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_adapter(tiny_model("vit"), tmp_path / "adapter_config.json")


def test_a_merged_model_has_no_adapter_to_save(tmp_path):
    model = trained()
    merge_adapter(model)
    with pytest.raises(ValueError, match="is not adapted"):
        save_adapter(model, tmp_path)


def test_a_missing_safetensors_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"need the package safetensors.*rlrr-kernels\[models\]"):
        save_adapter(trained(), tmp_path)
