"""torchrec's own tests of the two collections, run with ours in their place, where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

try:
    import torchrec
    from run_torchrec_tests import FILES, main, outcomes
except (ImportError, OSError) as error:
    pytest.skip(f"torchrec cannot be imported: {error}", allow_module_level=True)

# Tests of the kinds that the reasons tell apart.
EXAMPLE = """
import unittest

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection


def collection():
    return EmbeddingBagCollection([EmbeddingBagConfig(name="t", num_embeddings=4, embedding_dim=2)])


class Example(unittest.TestCase):
    def test_names(self):
        self.assertEqual(list(collection().state_dict()), ["embedding_bags.t.weight"])

    def test_script(self):
        torch.jit.script(collection())

    def test_seeded(self):
        torch.manual_seed(7)
        weight = collection().embedding_bags["t"].weight
        torch.manual_seed(7)
        drawn = torch.nn.EmbeddingBag(4, 2).weight.detach().uniform_(-0.5, 0.5)
        self.assertTrue(torch.equal(weight, drawn))

    def test_class(self):
        names = BaseManagedCollisionEmbeddingCollection.__init__.__globals__
        self.assertIsInstance(collection(), names["EmbeddingBagCollection"])

    def test_private(self):
        self.assertEqual(len(collection()._lengths_per_embedding), 1)

    def test_wrong(self):
        self.fail()

    @unittest.skip("never")
    def test_skipped(self):
        pass
"""


def test_reasons(tmp_path: Path) -> None:
    (tmp_path / "torchrec").mkdir()
    (tmp_path / "torchrec" / "test_example.py").write_text(EXAMPLE)
    found = outcomes(tmp_path, ["test_example.py"])
    assert {name.rpartition(".test_")[2]: outcome for name, outcome in found.items()} == {
        "names": "passes",
        "script": "TorchScript",
        "seeded": "literals",
        "class": "class",
        "private": "FAILS",
        "wrong": "fails with torchrec's own",
        "skipped": "skipped",
    }


def test_what_is_no_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert f"no checkout of torchrec: it has no torchrec/{FILES[0]}" in capsys.readouterr().err


def test_torchrecs_own_tests() -> None:
    """Of the installed package where it holds them, else of the checkout that ``TORCHREC_CHECKOUT`` names."""
    checkout = Path(os.environ.get("TORCHREC_CHECKOUT", Path(torchrec.__file__).parents[1]))
    if not (checkout / "torchrec" / FILES[0]).is_file():
        pytest.skip("the installed torchrec has no tests, and TORCHREC_CHECKOUT names no checkout of it")
    found = outcomes(checkout)
    assert [name for name, outcome in found.items() if outcome == "FAILS"] == []
    assert "passes" in found.values()
