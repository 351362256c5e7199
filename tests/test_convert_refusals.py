"""Checkpoints of others that are wrong, partial or hostile: one clear error, and no code runs."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from published import published, save_old, save_plain, save_safe
from torch import nn

import atsnn
from atsnn.checks import CheckpointError, InvalidType, InvalidValue
from atsnn.convert import from_spikformer, to_spikformer, to_spikingjelly

SMALL = dict(image_size=16, in_channels=2, num_classes=5, embed_dim=32, depth=2, num_heads=4, T=4)


def change(**tensors):
    def apply(state):
        state.update({name.replace("__", "."): value for name, value in tensors.items()})

    return apply


def drop(*names):
    def apply(state):
        for name in names:
            del state[name]

    return apply


def renumber(state):
    for name in [n for n in state if n.startswith("block.1.")]:
        state[name.replace("block.1.", "block.7.")] = state.pop(name)


def fill(name, value):
    return lambda state: state[name].view(-1)[:1].fill_(value)


def thousands(state):
    for number in range(2, 1001):
        state[f"block.{number}.attn.q_linear.weight"] = torch.zeros(32, 32)


def shared(state):
    block = {n: t for n, t in state.items() if n.startswith("block.1.")}
    for number in range(2, 900):
        state.update({n.replace("block.1", f"block.{number}"): t for n, t in block.items()})


def cast(name, dtype):
    return lambda state: state.update({name: state[name].to(dtype)})


HUGE = torch.zeros(1).expand(2**31)
WRONG = {
    "empty": (dict.clear, "got neither among 0 names"),
    "missing": (drop("block.1.mlp.fc2_bn.bias"), r"1 missing \['block.1.mlp.fc2_bn.bias'\]"),
    "missing stem": (drop("patch_embed.rpe_bn.weight"), "expected a tensor patch_embed.rpe_bn.w"),
    "no counter": (drop("block.0.attn.q_bn.num_batches_tracked"), "1 missing"),
    "foreign": (change(pos_embed=torch.zeros(1, 64, 32)), r"1 foreign \['pos_embed'\]"),
    "foreign in a block": (change(block__0__attn__x=torch.zeros(1)), "0 missing .* 1 foreign"),
    "a long name": (change(**{"x" * 10**6: torch.zeros(1)}), r"foreign \['x{76}\.\.\.\]$"),
    "both variants": (change(block__0__attn__q_conv__weight=torch.zeros(1)), "either .* got both"),
    "a gap": (renumber, "without gaps, got block 7 but no block 1"),
    "a block of many digits": (
        change(**{f"block.{'9' * 5000}.attn.q_linear.weight": torch.zeros(32, 32)}), "1 foreign",
    ),
    "deep": (thousands, "depth must be a number >= 1 and <= 1000, got 1001"),
    "deep by sharing": (shared, "expected tensors that share no memory, got"),
    "another shape": (
        change(block__0__mlp__fc2_linear__bias=torch.zeros(31)),
        r"block.0.mlp.fc2_linear.bias must have shape \(32\), got \(31\)",
    ),
    "another layer norm": (
        change(block__0__norm1__bias=torch.zeros(31)), r"norm1.bias must have shape \(32\)",
    ),
    "a scalar head": (change(head__weight=torch.tensor(1.0)), "must have 2 dimensions, got shape"),
    "no classes": (change(head__weight=torch.zeros(0, 32)), "num_classes must be a number >= 1"),
    "no channels": (change(patch_embed__rpe_bn__weight=torch.zeros(0)), "embed_dim must be"),
    "channels that do not fit": (
        change(patch_embed__rpe_bn__weight=torch.zeros(36)), "embed_dim must be a multiple of 8",
    ),
    "no width": (change(block__0__mlp__fc1_linear__weight=torch.zeros(0, 32)), "mlp_ratio must be"),
    "a huge shape": (
        change(patch_embed__rpe_bn__weight=HUGE), "must have memory for its shape .*, got 4 bytes",
    ),
    "integers": (cast("head.bias", torch.int32), r"head.bias' must have one of .* got torch.int32"),
    "bool": (cast("head.bias", torch.bool), "got torch.bool"),
    "complex": (cast("head.bias", torch.complex64), "got torch.complex64"),
    "a counter that is a float": (
        cast("patch_embed.rpe_bn.num_batches_tracked", torch.float32), "dtypes torch.int64, got",
    ),
    "two dtypes": (
        cast("head.bias", torch.float16), "one dtype for all weights, got .* and torch.float16",
    ),
    "sparse": (change(head__bias=torch.zeros(5).to_sparse()), "must be a dense tensor"),
    "meta": (change(head__bias=torch.zeros(5, device="meta")), "a dense tensor with values"),
    "NaN": (fill("block.0.attn.v_bn.weight", float("nan")), "v_bn.weight must be finite, got NaN"),
    "infinite": (fill("head.bias", float("inf")), "head.bias must be finite"),
    "NaN in a layer norm": (fill("block.0.norm2.bias", float("nan")), "norm2.bias must be finite"),
    "a negative variance": (fill("patch_embed.proj_bn.running_var", -1), "var must be >= 0"),
    "a negative counter": (fill("patch_embed.proj_bn.num_batches_tracked", -1), "must be >= 0"),
    "no tensor": (change(head__bias=[1.0]), "'head.bias' must be a tensor, got list"),
    "no string": (lambda state: state.update({3: torch.zeros(1)}), "strings, got 3 of type int"),
    "bytes": (lambda state: state.update({b"x": torch.zeros(1)}), "got b'x' of type bytes"),
    "a wrapper of nothing": (lambda s: (s.clear(), s.update(state_dict=3)), "a tensor, got int"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_state_dicts_are_refused(name):
    apply, message = WRONG[name]
    state = dict(published("cifar"))
    apply(state)
    with pytest.raises(CheckpointError, match=f"^from_spikformer: .*{message}") as caught:
        from_spikformer(state, num_heads=4)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "state_dict_ema", "model_ema"])
def test_wrong_states_in_wrappers_are_refused(wrapper):
    with pytest.raises(CheckpointError, match="got neither"):
        from_spikformer({wrapper: {}})


class Evil:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def damage_truncated(path, folder):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def damage_zeroed(path, folder):
    path.write_bytes(bytes(path.stat().st_size))


def damage_inside(path, folder):
    """The pickle inside the archive is cut; the archive itself is whole."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[: len(data) // 2] if name.endswith("data.pkl") else data)


def damage_compressed(path, folder):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))


FILES = {
    "truncated": (damage_truncated, "expected a file written by torch.save|a damaged or foreign"),
    "zeros": (damage_zeroed, "got: .*legacy .tar format$"),
    "empty": (lambda p, f: p.write_bytes(b""), "a file written by torch.save, got: EOFError"),
    "text": (lambda p, f: p.write_text("no checkpoint"), "got a damaged or foreign one"),
    "damaged inside": (damage_inside, "expected a"),
    "compressed": (damage_compressed, "without compression, .* got 'archive/data.pkl' compressed"),
    "code": (
        lambda p, f: torch.save({"state_dict": Evil(f / "ran")}, p), "refers to (io|_io).open",
    ),
    "code in a bare pickle": (
        lambda p, f: p.write_bytes(pickle.dumps(Evil(f / "ran"), 2)), "refers to (io|_io).open",
    ),
    "code in the old format": (
        lambda p, f: torch.save(Evil(f / "ran"), p, _use_new_zipfile_serialization=False),
        "refers to (io|_io).open",
    ),
    "a whole model": (lambda p, f: torch.save(nn.Linear(2, 2), p), "refers to torch.nn.modules"),
    "a list": (lambda p, f: torch.save([torch.zeros(1)], p), "expected a mapping .* got list"),
    "a number": (lambda p, f: torch.save(3, p), "expected a mapping of names to tensors, got int"),
    "a tensor": (lambda p, f: torch.save(torch.zeros(1), p), "expected a mapping .* got Tensor"),
    "missing": (lambda p, f: p.unlink(), "expected a file, got none"),
    "a directory": (lambda p, f: (p.unlink(), p.mkdir()), "expected a file, got a directory"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_wrong_files_are_refused_and_run_no_code(name, tmp_path):
    damage, message = FILES[name]
    path = save_plain(published("cifar"), tmp_path)
    damage(path, tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        from_spikformer(path, num_heads=4)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, pickle.dumps([1])])
def test_wrong_safetensors_are_refused(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="expected a safetensors file, got"):
        from_spikformer(path)
    save_safe(published("cifar"), tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="expected a safetensors file, got"):
        from_spikformer(path)


def test_truncation_anywhere_is_refused(tmp_path):
    path = save_old(published("cifar", depth=1), tmp_path)
    data = path.read_bytes()
    for end in range(0, len(data), len(data) // 50):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            from_spikformer(path, num_heads=4)


def test_other_endings_are_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"ends in one of \.pth, .* got 'model.bin'"):
        from_spikformer(path)


@pytest.mark.parametrize("source", [None, 3, b"model.pth", [("a", 1)], nn.Linear(1, 1)])
def test_other_sources_are_refused(source):
    with pytest.raises(InvalidType, match="expected a state dict or a path, got"):
        from_spikformer(source)


def test_a_claimed_size_allocates_nothing(tmp_path):
    """A file of some kilobytes that claims 64 GiB, read under a limit of memory."""
    state = dict(published("cifar"))
    dim = 2**16
    state["patch_embed.rpe_bn.weight"] = torch.zeros(dim)
    for name in ("q", "k", "v"):
        state[f"block.0.attn.{name}_linear.weight"] = torch.zeros(1).expand(dim, dim)
    torch.save(state, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").stat().st_size < 2**20
    script = (
        "import resource, sys, atsnn\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    atsnn.convert.from_spikformer(sys.argv[1], num_heads=4)\n"
        "except atsnn.AtsnnError as error:\n    print(error)\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.pth")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "must have memory for its shape (65536, 65536), got 4 bytes" in done.stdout


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "num_heads must be given for a cifar Spikformer-2-32, as no shape shows it"),
        (dict(num_heads=5), "embed_dim must be a multiple of num_heads 5, got 32"),
        (dict(num_heads=0), "num_heads must be a number >= 1"),
        (dict(num_heads=4, pool="none"), "pool must be one of"),
        (dict(num_heads=4, depth=3), "depth must be 2, as in the given weights, got 3"),
        (dict(num_heads=4, attention="sdsa"), "attention must be 'ssa'"),
        (dict(num_heads=4, bias=False), "bias must be True"),
        (dict(num_heads=4, heads=3), "got heads"),
        (dict(num_heads=4, T=0), "T must be a number >= 1"),
        (dict(num_heads=4, image_size=30), "image_size must be a multiple of 4"),
        (dict(num_heads=4, halting="rect"), "halting must be one of"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(InvalidValue, match=message):
        from_spikformer(published("cifar"), **settings)


@pytest.mark.parametrize("export", [to_spikformer, to_spikingjelly])
def test_models_that_others_cannot_express_are_refused(export):
    base = atsnn.SpikformerConfig(**SMALL, pool="before_lif", bias=False)
    for changes, message in (
        (dict(attention="sdsa"), "expected Spikformer's attention 'ssa', got attention='sdsa'"),
        (dict(halting="depth"), "got halting='depth'"),
        (dict(merge_threshold=0.5), "merge_threshold=0.5; drop_halting=True leaves them out"),
    ):
        with pytest.raises(InvalidValue, match=message):
            export(atsnn.ATSpikformer(base.replace(**changes)))
    assert export(atsnn.ATSpikformer(base.replace(halting="depth")), drop_halting=True)
    with pytest.raises(InvalidType, match="model must be an ATSpikformer, got Linear"):
        export(nn.Linear(1, 1))


def test_unknown_variants_are_refused():
    with pytest.raises(InvalidValue, match="variant must be one of 'cifar', 'imagenet', got 'dvs'"):
        to_spikformer(atsnn.ATSpikformer(atsnn.SpikformerConfig(**SMALL)), variant="dvs")
