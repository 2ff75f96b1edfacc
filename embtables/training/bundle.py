"""A trained model with all that it takes to score raw rows: a folder, no pickle.

::

    bundle.json                  how raw rows become ids and numbers; sizes and checksums of the other files
    vocabularies.safetensors     by feature, some bytes of the hash of each value, in the order of ids
    served/                      tables and model, as ``load_served`` reads them
    graph.pt2  graph.onnx        where asked for: the model as a graph of ids, see ``embtables.training.graphs``
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictStr
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from embtables._util.files import check_seal, not_written, replacing_folder, sealed, sha256
from embtables.datasets import PreparedDataset
from embtables.datasets.dense_scale import SCALES
from embtables.datasets.encoder import Encoder, encoder_of
from embtables.datasets.encoding import HASH_BYTES, Encoding, HashedVocabulary, probe
from embtables.tables import EmbeddingTables
from embtables.training.config import config_of
from embtables.training.export import MODEL, TABLES, Served, copy_served, described, load_served, served_of
from embtables.training.planning import selected
from embtables.training.records import check_files, read_record, validated

__all__ = ["Bundle", "check_bundle", "load_bundle", "save_bundle"]

FORMAT, VERSION = "embtables-bundle", 1
BUNDLE, VOCABULARIES, SERVED = "bundle.json", "vocabularies.safetensors", "served"
_CHECKED = (VOCABULARIES, f"{SERVED}/{MODEL}")
"""What bundle.json vouches for; served/model.json vouches for the rest of its folder."""


class VocabularySize(BaseModel):
    """The vocabulary of one feature: ``false_share`` of the values that it does not hold are taken for one it does."""

    values: int
    bytes: int
    false_matches: int
    false_share: float


class Bundle(BaseModel):
    """What bundle.json holds."""

    model_config = ConfigDict(strict=True)

    encoding: Encoding
    batch_size: int = Field(ge=1)
    """Of evaluation: sums in the model may differ in their last bits between batches of other sizes."""
    probe: list[StrictStr]
    vocabularies: dict[str, VocabularySize]
    bytes: dict[str, int]
    """By file, bundle.json itself excepted."""
    graphs: dict[str, str] = {}
    """What became of each graph, in words."""
    sha256: dict[str, StrictStr]

    def words(self) -> list[str]:
        """What the bundle holds and how many bytes that takes."""
        kept = sum(of.bytes for of in self.vocabularies.values())
        values = sum(of.values for of in self.vocabularies.values())
        false = sum(of.false_matches for of in self.vocabularies.values())
        share = max((of.false_share for of in self.vocabularies.values()), default=0.0)
        tables = self.bytes[f"{SERVED}/{TABLES}"]
        lines = [f"{size:>13,} bytes  {name}" for name, size in self.bytes.items()]
        lines.append(
            f"vocabularies: {values:,} values in {kept:,} bytes, {false:,} of them taken for another; "
            f"of unknown values at most {share:.1g} are taken for a known one"
        )
        if kept > tables:
            lines.append(
                f"NOTE the vocabularies are {kept / tables:.1f} times as large as the tables: a larger --min-count of "
                "`embtables prepare` makes them smaller, and tables over raw 64-bit ids, num_embeddings=None, need none"
            )
        return [*lines, *self.graphs.values()]


def save_bundle(
    run: str | Path,
    data: PreparedDataset,
    out: str | Path,
    *,
    graphs: bool = False,
    model: type[nn.Module] | None = None,
) -> Bundle:
    """Writes the bundle of a finished run in one step; a folder of that name is replaced.

    Args:
        run: the run's folder.
        data: the prepared data that it was trained on.
        out: the folder to write.
        graphs: whether to write the graphs, for which the model is built.
        model: the class of a model of one's own, which graphs need.

    Raises:
        ValueError: the run is not finished or damaged, or was trained on other data; or the data does not tell how raw
            rows become ids.
    """
    run, out = Path(run), Path(out)
    config, manifest = config_of(run)
    if sha256(data.path / "manifest.json") != manifest:
        raise ValueError(f"{run} was trained on other data than {data.path}: give the folder it was trained on")
    data, served = selected(config, data), served_of(run)
    encoder = encoder_of(data)
    with replacing_folder(out) as temporary:
        copy_served(served, temporary / SERVED)
        try:
            save_file({name: of.hashes for name, of in encoder.vocabularies.items()}, temporary / VOCABULARIES)
        except SafetensorError as error:
            raise not_written(out / VOCABULARIES, error) from error
        size = config.training.evaluation_batch_size
        said = {}
        if graphs:
            from embtables.training.graphs import export_graphs  # which imports exporters

            batch = next(data.batches("valid", min(size, 256)))
            said = export_graphs(load_served(served, model=model), batch, temporary)
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        bundle = Bundle(
            encoding=encoder.encoding,
            batch_size=size,
            probe=probe(),
            vocabularies={
                name: VocabularySize(
                    values=len(of.hashes),
                    bytes=of.hashes.nbytes,
                    false_matches=of.false_matches,
                    false_share=of.false_share,
                )
                for name, of in encoder.vocabularies.items()
            },
            bytes={path.relative_to(temporary).as_posix(): path.stat().st_size for path in files},
            graphs=said,
            sha256={path.relative_to(temporary).as_posix(): sha256(path) for path in files},
        )
        record = sealed({"format": FORMAT, "version": VERSION, **bundle.model_dump()})
        (temporary / BUNDLE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return bundle


def check_bundle(folder: Path) -> Bundle:
    """What bundle.json says, which fits the files that it names.

    Raises:
        ValueError: naming the file that is missing, damaged, of another kind, or a link out of the folder.
    """
    path = folder / BUNDLE
    if not path.is_file():
        raise ValueError(f"{folder} is no bundle: {BUNDLE} is missing; `embtables bundle` makes one of a run")
    content = read_record(folder, BUNDLE, "bundle", FORMAT, VERSION)
    check_seal(content, path)
    bundle = validated(path, lambda found: Bundle.model_validate_json(json.dumps(found)), content)
    check_files(folder, _CHECKED, bundle.sha256, BUNDLE)
    return bundle


def load_bundle(
    folder: Path, device: torch.device | str | None, model: type[nn.Module] | None, allow_import: bool
) -> tuple[Bundle, Encoder, nn.Module]:
    """What bundle.json says, the encoder, and the model, ready for inference. The arguments are as in ``load_served``.

    Raises:
        ValueError: as ``check_bundle`` and ``load_served``, and where vocabularies, encoding and tables do not fit.
    """
    bundle = check_bundle(folder)
    if bundle.probe != probe():
        raise ValueError(
            f"{folder / BUNDLE}: hashes of values are others than those of the installed pandas: make it again"
        )
    built = load_served(folder / SERVED, device, model=model, allow_import=allow_import)
    served = described(folder / SERVED)
    assert isinstance(built.embeddings, EmbeddingTables)
    rows = {name: table.num_embeddings for table in built.embeddings.plan.tables for name in table.feature_names}
    return bundle, _encoder(folder, bundle.encoding, served, rows), built


def _encoder(folder: Path, encoding: Encoding, served: Served, rows: Mapping[str, int | None]) -> Encoder:
    """The encoder of a bundle, whose parts fit each other and the numbers of ids of the tables, by feature."""
    path = folder / VOCABULARIES
    try:
        hashes: dict[str, Any] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name in (*served.feature_names, *served.dense_features, *served.list_features, *served.histories):
        if name not in encoding.columns:
            raise ValueError(f"{folder / BUNDLE} does not say which column '{name}' is from: it is damaged")
    for name in served.dense_features:
        if name not in encoding.scales or encoding.scales[name].kind not in SCALES:
            raise ValueError(f"{folder / BUNDLE} has no scale of '{name}': it is damaged")
    vocabularies = {}
    for name in (*served.feature_names, *served.list_features):
        found = hashes.get(name)
        fits = found is not None and found.dtype == "uint8" and found.ndim == 2 and 1 <= found.shape[1] <= HASH_BYTES
        if found is None or not fits or len(found) + 2 != rows[name]:
            raise ValueError(f"{path} does not hold the vocabulary of '{name}' that its table is of: it is damaged")
        vocabularies[name] = HashedVocabulary(found)
    return Encoder(
        encoding,
        vocabularies,
        served.feature_names,
        served.dense_features,
        served.list_features,
        served.histories,
        served.max_history,
    )
