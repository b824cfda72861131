"""Text becomes a dataset that Megatron reads back, the same each time."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from scripts.examples.prepare_data import END_OF_DOCUMENT, VOCABULARY, write_dataset
from tests.harness import Megatron

ROOT = Path(__file__).parents[2]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with three files of text, and others that are none."""
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("second")
    (folder / "a.txt").write_text("first, with an umlaut: ä")
    (folder / "sub" / "c.md").write_text("third")
    (folder / "empty.txt").write_text("")
    (folder / "image.bin").write_bytes(b"\xff\xfe\x00\x01")
    (folder / "zeros.txt").write_bytes(b"text\0more")
    (folder / ".hidden").write_text("hidden")
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "module.py").write_text("installed")
    return folder


def read(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_reads_back_one_document_a_file_in_order(texts: Path, tmp_path: Path) -> None:
    written = write_dataset(tmp_path / "out" / "data", texts)
    expected = ["first, with an umlaut: ä", "second", "third"]
    documents = read(written.prefix)
    assert [bytes(d[:-1]).decode() for d in documents] == expected
    assert [d[-1] for d in documents] == [END_OF_DOCUMENT] * 3
    assert (written.documents, written.tokens) == (3, sum(map(len, documents)))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["data.bin", "data.idx"]


def test_same_folder_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        written = write_dataset(tmp_path / name, max_bytes=300_000)
    assert written.documents > 5
    for suffix in (".bin", ".idx"):
        first, second = ((tmp_path / f"{n}{suffix}").read_bytes() for n in ("one", "two"))
        assert first == second


def test_size_is_capped_and_the_last_document_cut(texts: Path, tmp_path: Path) -> None:
    written = write_dataset(tmp_path / "data", texts, max_bytes=28)
    documents = read(written.prefix)
    assert sum(len(d) - 1 for d in documents) == 28
    assert bytes(documents[-1][:-1]) == b"sec"
    assert documents[-1][-1] == END_OF_DOCUMENT


def test_flags_name_a_tokenizer_that_agrees(texts: Path, tmp_path: Path) -> None:
    from megatron.core.tokenizers.text.libraries import NullTokenizer

    flags = write_dataset(tmp_path / "data", texts).flags()
    assert flags[flags.index("--vocab-size") + 1] == str(VOCABULARY)
    assert NullTokenizer(VOCABULARY).eod == END_OF_DOCUMENT


def test_a_folder_without_text_is_named(texts: Path, tmp_path: Path) -> None:
    for path in (texts / "a.txt", texts / "b.txt", texts / "sub" / "c.md"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no text in .*texts.*Give a folder"):
        write_dataset(tmp_path / "data", texts)
    with pytest.raises(ValueError, match=r"no folder at .*nowhere"):
        write_dataset(tmp_path / "data", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="max_bytes = 0"):
        write_dataset(tmp_path / "data", texts, max_bytes=0)
    assert not list(tmp_path.glob("data*"))


SCRIPT = ROOT / "scripts" / "examples" / "prepare_data.py"


def test_script_prints_the_flags(texts: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "data"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(prefix), "--text", str(texts)],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 documents, ")
    assert f"--data-path {prefix} --tokenizer-type NullTokenizer" in done.stdout


def test_script_names_a_folder_that_is_not_there(megatron: Megatron, tmp_path: Path) -> None:
    words = ["--output", str(tmp_path / "data"), "--text", str(tmp_path / "nowhere")]
    failed = megatron.script(str(SCRIPT), words, world=1)
    assert failed.status == {0: 2}
    assert "no folder at" in failed.log(0)
