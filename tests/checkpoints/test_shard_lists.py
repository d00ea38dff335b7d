"""Lists of shards from strangers: nothing that stands in them runs."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_models import tiny_model
from torch.distributed.checkpoint.metadata import Metadata

import hf_stable
from hf_stable.checkpoints.folding import fold_checkpoint
from hf_stable.checkpoints.shard_lists import SafeReader


class Calls:
    """A pickle that calls a function when it is read."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture
def shards(tmp_path):
    """FSDP's shards of a patched model, and its config."""
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path / "config")
    folder = tmp_path / "run" / "pytorch_model_fsdp_0"
    dcp.save({"model": model.state_dict(), "step": 3}, checkpoint_id=folder, no_dist=True)
    return folder


def fold(shards):
    folder = shards.parents[1]
    return fold_checkpoint(shards.parent, folder / "out", str(folder / "config"))


def test_a_list_of_shards_is_read_as_torch_reads_it(shards):
    safe, torchs = (reader(shards).read_metadata() for reader in (SafeReader, dcp.FileSystemReader))
    torchs.storage_meta.load_id = safe.storage_meta.load_id  # each reader's own
    assert safe == torchs
    assert fold(shards).num_layers > 0


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ("touch MARK",)),
        (subprocess.check_output, (["touch", "MARK"],)),
        (eval, ("open('MARK', 'w')",)),
        (getattr, ("text", "format")),
        (torch.load, ("MARK",)),
        (bytearray, (10**13,)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_nothing_in_it_runs(function, arguments, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (shards / ".metadata").write_bytes(pickle.dumps(Calls(function, *arguments)))
    with pytest.raises(ValueError, match=r"asks for .*, of which no list of shards is made"):
        fold(shards)
    assert not (tmp_path / "MARK").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["os.system", "dataclass", "Metadata.__init__", "__loader__"])
def test_torchs_own_module_is_no_way_to_others(name, shards):
    module = Metadata.__module__
    source = f"\x80\x04\x8c{chr(len(module))}{module}\x8c{chr(len(name))}{name}\x93."
    (shards / ".metadata").write_bytes(source.encode("latin-1"))
    with pytest.raises(ValueError, match=r"asks for .*, of which no list of shards is made"):
        fold(shards)


def test_files_outside_the_folder_are_not_read(shards):
    metadata = SafeReader(shards).read_metadata()
    for stored in metadata.storage_data.values():
        stored.relative_path = "../secret.distcp"
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"names the file '\.\./secret\.distcp' outside"):
        fold(shards)


def test_a_stray_file_of_that_name_beside_weights_is_no_matter(tmp_path):
    hf_stable.patch(tiny_model("gpt2"), "sigma_reparam").save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / ".metadata").write_bytes(pickle.dumps(Calls(os.system, "touch MARK")))
    assert fold_checkpoint(tmp_path / "saved", tmp_path / "out").num_layers > 0
    shutil.rmtree(tmp_path / "out")
