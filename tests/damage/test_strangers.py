"""What SECURITY.md promises: a file from a stranger is refused, and does nothing else."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import pickle
import resource
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

from embtables import EmbeddingTables, TableConfig, plan
from embtables._util.files import PREFIX, sealed, sha256, unsealed
from embtables._util.reading import parse_yaml, read_array, read_json, read_yaml
from embtables.cli.app import run as main
from embtables.datasets import PreparedDataset
from embtables.sweeps.summary import summarize
from embtables.training import load_config, load_served
from embtables.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--model", "mlp", "--epochs", "1", "--embedding-dim", "4", "--quiet"]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stranger") / "run"
    assert main(["train", str(data), "--out", str(folder), *QUICK]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "theirrun")
    return tmp_path / "theirrun"


@pytest.fixture
def prepared(data: Path, tmp_path: Path) -> Path:
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A record with other entries, and the checksum of those."""
    is_json = path.suffix == ".json"
    record = unsealed(json.loads(path.read_text()) if is_json else yaml.safe_load(path.read_text()))
    change(record)
    path.write_text(json.dumps(sealed(record)) if is_json else yaml.safe_dump(sealed(record)))


# ---- no code -------------------------------------------------------------------------------------------------------


def test_a_run_that_names_a_module_of_its_own(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exporting runs nothing, loading refuses, and allowing imports does not search the working directory."""
    (run / "payload.py").write_text(
        "import pathlib\npathlib.Path('ran').touch()\nfrom torch import nn\nM = nn.Linear\n"
    )
    rewrite(run / "served" / "model.json", lambda record: record.update(model="theirrun.payload:M"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", ".", str(tmp_path))])
    before = list(sys.path)
    assert main(["export", "theirrun", "out"]) == 0
    with pytest.raises(
        ValueError, match=r"model\.json names the model 'theirrun\.payload:M', which is not of this pack"
    ):
        load_served("out")
    with pytest.raises(ValueError, match="cannot import 'theirrun.payload'"):
        load_served("out", allow_import=True)
    assert sys.path == before and "theirrun" not in sys.modules and not (tmp_path / "ran").exists()


def test_a_configuration_names_installed_modules_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    (tmp_path / "run.yaml").write_text("model: {name: 'beside:M'}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", ".")])
    assert main(["train", str(data), "--config", "run.yaml", "--out", "run"]) == 2
    assert "the working directory is searched for what --model names, not for other names" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert main(["train", str(data), "--model", "beside:M", "--out", "run"]) == 2  # the module is read, and has no M
    assert (tmp_path / "ran").exists() and "module 'beside' has no 'M'" in capfd.readouterr().err


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_nothing_is_unpickled(run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    payload = Payload(marker)
    arrays, checkpoint = tmp_path / "scores.npy", tmp_path / "last.pt"
    np.save(arrays, np.array([payload], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="scores.npy is damaged"):
        read_array(arrays, np.float32)
    torch.save({"format": "embtables-checkpoint", "state": payload}, checkpoint)
    with pytest.raises(ValueError, match="last.pt is damaged"):
        load_checkpoint(checkpoint, {})
    for path in (arrays, checkpoint, tmp_path / "t.safetensors"):
        path.write_bytes(pickle.dumps(payload))
        for read in (lambda p: read_array(p, np.float32), lambda p: load_checkpoint(p, {}), EmbeddingTables.load):
            with pytest.raises(ValueError, match=path.name):
                read(path)
    assert not marker.exists()
    os.system(f"touch {marker}")  # the payload would have worked
    assert marker.exists()


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_reader_goes_another_way() -> None:
    """Files are read where damage is looked for: whoever adds a reader uses ``embtables._util.reading``."""
    allowed = {
        # Code that is asked for by name on the command line, by an entry point, or is part of the package.
        "importlib.import_module": {
            *("embtables/cli/app.py", "embtables/methods/__init__.py"),
            *("datasets/readers/__init__.py", "models/registry.py"),
        },
        "yaml.safe_load": {"embtables/_util/reading.py", "datasets/readers/reczoo.py"},  # one of the package's own
        # Texts that are no records: lines of logs, plans in files of tables, and programs for the native library.
        "json.loads": {
            *("embtables/_util/reading.py", "embtables/tables/files.py"),
            *("embtables/methods/pruned.py", "embtables/ops/ids.py"),
            *("datasets/readers/amazon.py", "datasets/readers/s3rec.py", "datasets/writing.py"),
            # Headers of served files; the reader in NumPy stands alone.
            *("embtables/serving/numpy_reader.py", "embtables/serving/deltas.py"),
        },
        "ast.literal_eval": {"datasets/readers/amazon.py"},
    }
    forbidden = {"eval", "exec", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "json.load", "pickle.loads"}
    forbidden |= {"pickle.load", "shelve.open", "marshal.loads", "joblib.load", "runpy.run_path", "os.system"}
    found = []
    for folder in ("embtables", "datasets", "models"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for called, node in calls(ast.parse(path.read_text())):
                kept = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                unsafe = called == "torch.load" and kept.get("weights_only") != "True"
                if called in forbidden or unsafe or name not in allowed.get(called, {name}):
                    found.append(f"{name}:{node.lineno} {called}")
    assert found == []


# ---- no memory beyond the file's -----------------------------------------------------------------------------------


def npy(shape: str) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(40)


def huge_tables(path: Path) -> None:
    """Tables whose plan says that there are 2**40 rows of 65,536 columns, in a file of a few."""
    described = plan([TableConfig("a", 200, 8)], "hash", "50%", optimizer=None).to_dict()
    text = json.dumps(described).replace('"rows": 100', f'"rows": {2**40}').replace('"width": 8', '"width": 65536')
    save_file({"weight_8": torch.zeros(100, 8)}, path, metadata={"embtables": text})


def zip_bomb(path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**27)
    path.write_bytes(out.getvalue())


BOMBS: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object]]] = {
    "array": ("a.npy", lambda p: p.write_bytes(npy(f"({2**60},)")), lambda p: read_array(p, np.float32)),
    "header": ("a.npy", lambda p: p.write_bytes(npy("(" * 30_000)), lambda p: read_array(p, np.float32)),
    "tables": ("t.safetensors", huge_tables, EmbeddingTables.load),
    "safetensors": ("t.safetensors", lambda p: p.write_bytes(struct.pack("<Q", 2**60) + b"{}"), EmbeddingTables.load),
    "brackets": ("a.json", lambda p: p.write_text("[" * 10**6), read_json),
    "yaml brackets": ("a.yaml", lambda p: p.write_text("[" * 10**5), read_yaml),
    "aliases": (
        "a.yaml",
        lambda p: p.write_text(
            "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 30))
        ),
        read_yaml,
    ),
    "itself": ("a.yaml", lambda p: p.write_text("a: &a [*a]"), read_yaml),
    "archive": ("last.pt", zip_bomb, lambda p: load_checkpoint(p, {})),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_claims_to_be_huge(name: str, tmp_path: Path) -> None:
    """Refused in a process that may take 64 MiB more than it has, which an array of the claimed size would exceed."""
    file, write, read = BOMBS[name]
    path = tmp_path / file
    write(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=file):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


def test_a_manifest_that_claims_rows(prepared: Path) -> None:
    """Memory is taken for as many rows as the shard itself has, and for no more than a shard may have."""

    def claim(rows: int) -> None:
        def change(record: dict[str, Any]) -> None:
            split = record["splits"]["train"]
            split["rows"] += rows - split["shards"][0]["rows"]
            split["shards"][0]["rows"] = rows

        rewrite(prepared / "manifest.json", change)

    claim(2**60)
    with pytest.raises(ValueError, match=r"manifest\.json: field 'splits\.train\.shards\.0\.rows'"):
        PreparedDataset(prepared)
    rewrite(prepared / "manifest.json", lambda record: None if record else None)
    claim(2**23)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="00000.parquet: .* rows where manifest.json says 8388608"):
        next(PreparedDataset(prepared).batches("train", 10))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16


def test_a_model_that_claims_layers(run: Path) -> None:
    """Each number may be small: sizes multiply."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for units, told in (
        ([10**9, 10**9], r"model\.json describes no model .*: the hyperparameter 1000000000 is beyond all weights"),
        (
            [30_000, 30_000],
            r"model\.safetensors does not fit .*: hidden.layers.0.weight is \[30000, \d+\], and \[128, \d+\] in",
        ),
        (
            [8],
            r"model\.safetensors does not fit .*: hidden.layers.0.weight is \[8, \d+\], and \[128, \d+\] in",
        ),
    ):
        rewrite(
            run / "served" / "model.json", lambda record, units=units: record["hyperparameters"].update(units=units)
        )
        with pytest.raises(ValueError, match=told):
            load_served(run / "served")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16


def test_a_served_model_whose_features_are_at_odds(run: Path) -> None:
    path = run / "served" / "model.json"
    for change, told in (
        ({"max_history": -5}, "field 'max_history' is damaged"),
        ({"feature_names": ["feature_0", "feature_0", "feature_1"]}, "names the feature 'feature_0' twice"),
        ({"feature_names": ["feature_0"], "histories": {"feature_1": "nonesuch"}}, "has a history of 'nonesuch'"),
    ):
        was = path.read_text()
        rewrite(path, lambda record, change=change: record.update(change))
        with pytest.raises(ValueError, match=told):
            load_served(run / "served")
        path.write_text(was)


def test_counts_that_are_many_more_than_ids(prepared: Path) -> None:
    """64 million zeros in about a kilobyte, with a checksum that fits."""
    path = prepared / "frequencies.parquet"
    schema, features = pq.read_schema(path), len(pq.read_table(path))
    zeros = pa.array(np.zeros(2**24, np.int64))
    counts = pa.ListArray.from_arrays(pa.array([0, *[2**24] * features], pa.int32()), zeros)
    columns = {name: pq.read_table(path).column(name) for name in schema.names} | {"counts": counts}
    pq.write_table(pa.table(columns), path, compression="zstd")

    def described(record: dict[str, Any]) -> None:
        record["frequencies"] |= {"bytes": path.stat().st_size, "sha256": sha256(path)}

    rewrite(prepared / "manifest.json", described)
    with pytest.raises(ValueError, match=r"frequencies.parquet: more than the \d+ counts that manifest.json says"):
        _ = PreparedDataset(prepared).frequencies


def test_yaml_that_json_does_not_know() -> None:
    for text, told in (
        ("2020-01-01", "holds a date, '2020-01-01': put it in quotes"),
        ("!!set {x}", "holds a set, "),
        ("{1: 2, b: 3}", "holds the key 1, which is no text: put it in quotes"),
        ("{null: 2}", "holds the key None, which is no text"),
    ):
        with pytest.raises(ValueError, match=told):
            parse_yaml(f"a: {text}")
        with pytest.raises(ValueError, match="model.hyperparameters.a: the value .* is not valid YAML"):
            load_config(overrides=[f"model.hyperparameters.a={text}"])


def test_references_of_ones_own_are_taken() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x}") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1}}


# ---- no other folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../secret.parquet", "/etc/passwd", "train/../../secret.parquet", "", "a\0b", "\ud800"]
)
def test_a_manifest_that_names_files_elsewhere(name: str, prepared: Path) -> None:
    shutil.copy(prepared / "train" / "00000.parquet", prepared.parent / "secret.parquet")

    def shard(record: dict[str, Any]) -> None:
        record["splits"]["train"]["shards"][0]["file"] = name

    rewrite(prepared / "manifest.json", shard)
    with pytest.raises(ValueError, match=r"manifest\.json: the file .* is not inside of"):
        PreparedDataset(prepared)


def test_links_out_of_a_folder(prepared: Path, run: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A link to the folder itself is anyone's right; links that leave it are not followed, to read or to write."""
    (prepared.parent / "link").symlink_to(prepared)
    assert PreparedDataset(prepared.parent / "link").num_rows("train")
    shard = prepared / "train" / "00000.parquet"
    shard.rename(prepared.parent / "elsewhere.parquet")
    shard.symlink_to(prepared.parent / "elsewhere.parquet")
    with pytest.raises(ValueError, match="00000.parquet is a link out of its folder"):
        PreparedDataset(prepared)

    weights = run / "served" / "model.safetensors"
    weights.rename(run.parent / "secret")
    weights.symlink_to(run.parent / "secret")
    assert main(["export", str(run), str(run.parent / "out")]) == 2
    assert "model.safetensors is a link out of its folder" in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"model\.safetensors is a link out"):
        load_served(run / "served")
    assert not (run.parent / "out").exists()

    precious = run.parent / "precious" / "best-1"
    precious.mkdir(parents=True)
    shutil.rmtree(run / "checkpoint")
    (run / "checkpoint").symlink_to(run.parent / "precious")
    assert main(["train", str(data), "--out", str(run), *QUICK]) == 2
    assert "checkpoint is a link" in capfd.readouterr().err and precious.is_dir()


def test_a_sweep_whose_cells_are_elsewhere(fake: Path, data: Path, tmp_path: Path) -> None:
    from sweep_cases import config_of
    from sweep_cases import run as run_sweep

    sweep = tmp_path / "sweep"
    run_sweep(config_of(data, 1, "50%"), sweep)
    cell = sweep / "cells" / "hash-50pct-s0"
    cell.rename(tmp_path / "elsewhere")
    cell.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="hash-50pct-s0 is a link out of its folder"):
        summarize(sweep, resamples=20)
    with pytest.raises(ValueError, match="hash-50pct-s0 is a link, and a sweep writes"):
        run_sweep(config_of(data, 1, "50%"), sweep)
    cell.unlink()
    (tmp_path / "elsewhere").rename(cell)
    (tmp_path / "mine" / f"{PREFIX}mine.tmp").mkdir(parents=True)
    (cell / "checkpoint").symlink_to(tmp_path / "mine")
    run_sweep(config_of(data, 1, "50%"), sweep)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [f"{PREFIX}mine.tmp"]
    results = (sweep / "results.csv").read_text()
    (sweep / "results.csv").write_text(results.replace("hash-50pct-s0", "../../elsewhere"))
    with pytest.raises(ValueError, match=r"results\.csv calls the cell hash-50pct-s0 '\.\./\.\./elsewhere'"):
        summarize(sweep, resamples=20)


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("inference_bytes", "inf", "has rows that no sweep writes"),
        ("inference_bytes", "", "has rows that no sweep writes"),
        ("seed", "inf", "has rows that no sweep writes"),
        ("floor_bytes", "1.5", "has rows that no sweep writes"),
        ("status", "infeasible", "has rows that no sweep writes"),
        ("status", "failed", "calls the cell .* failed, whose metrics.json says ok"),
    ],
)
def test_results_that_no_sweep_writes(
    column: str, value: str, told: str, fake: Path, data: Path, tmp_path: Path
) -> None:
    from sweep_cases import config_of
    from sweep_cases import run as run_sweep

    run_sweep(config_of(data, 1, "50%"), tmp_path / "sweep")
    path = tmp_path / "sweep" / "results.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    next(row for row in rows if row["status"] == "ok")[column] = value
    with path.open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ValueError, match=f"results.csv {told}"):
        summarize(tmp_path / "sweep", resamples=20)


def test_results_that_are_cut_off(fake: Path, data: Path, tmp_path: Path) -> None:
    from sweep_cases import config_of
    from sweep_cases import run as run_sweep

    run_sweep(config_of(data, 1, "50%"), tmp_path / "sweep")
    path = tmp_path / "sweep" / "results.csv"
    whole = path.read_text()
    for length in (whole.index("varian") + 5, len(whole) - 1, len(whole) // 2):
        path.write_text(whole[:length])
        with pytest.raises(
            ValueError, match=r"results\.csv is damaged \(its last row has no end\): start the sweep again"
        ):
            summarize(tmp_path / "sweep", resamples=20)


def test_what_configurations_say_is_all_that_they_do(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training: !!python/object/apply:os.system ['touch ran']\n")
    with pytest.raises(ValueError, match=r"run\.yaml: line 1 is not valid YAML"):
        load_config(tmp_path / "run.yaml")


def test_the_promise_names_what_is_tested() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    for word in ("unpickled", "memory", "lead out of", "link", "checksum", "allow_import=True"):
        assert word in text
