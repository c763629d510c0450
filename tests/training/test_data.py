"""Training data on disk: what is written is read back, what is damaged is left out and told, nothing is half done."""

import csv
import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from gen import command
from gen.picture import read_picture
from training.data.cache import encoded
from training.data.examples import DataError
from training.data.folder import Captioned, write_folder
from training.data.pictures import Pictures
from training.data.shapes_set import shapes
from training.data.shards import write_shards

WRITERS = [write_folder, write_shards]


def picture(value: int, side: int = 8) -> np.ndarray:
    return np.full((side, side, 3), value, dtype=np.uint8)


def captioned(number: int) -> Iterator[Captioned]:
    for index in range(number):
        yield picture(index), f"number {index}", f"{index // 2}"


def lines(folder: Path, *rows: dict[str, object]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures of one colour each."""
    write_folder(tmp_path / "data", captioned(5))
    return tmp_path / "data"


# --- round trips ------------------------------------------------------------------------------------------


def test_folder_and_shards_hold_the_same(tmp_path: Path) -> None:
    drawn = list(shapes(10))
    assert write_folder(tmp_path / "folder", iter(drawn)) == 10
    assert write_shards(tmp_path / "shards", iter(drawn), per_shard=4) == 10
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]
    for data in (Pictures(tmp_path / "folder", 64), Pictures(tmp_path / "shards", 64)):
        assert len(data) == 10 and not data.skipped.counts
        for index, (pixels, text, group) in enumerate(drawn):
            assert torch.equal(data[index][0], torch.from_numpy(pixels).permute(2, 0, 1))
            assert data[index][1] == text and data.examples[index].group == group
        assert data.groups() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_shards_are_what_webdataset_reads(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    drawn = list(shapes(3))
    write_shards(tmp_path / "shards", iter(drawn))
    found = list(webdataset.WebDataset(str(tmp_path / "shards" / "00000.tar"), shardshuffle=False).decode("rgb8"))
    assert [sample["txt"] for sample in found] == [text for _, text, _ in drawn]
    for sample, (pixels, text, group) in zip(found, drawn, strict=True):
        assert np.array_equal(sample["png"], pixels)
        assert sample["json"]["caption"] == text and sample["json"]["group"] == group


def test_the_folder_is_what_datasets_calls_an_imagefolder(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [(row["text"], row["group"]) for row in rows] == [(f"number {i}", str(i // 2)) for i in range(5)]
    assert all((folder / row["file_name"]).is_file() for row in rows)


@pytest.mark.parametrize("mark", ["", "\ufeff"])  # spreadsheets begin a file with a byte-order mark
def test_a_csv_folder(folder: Path, mark: str) -> None:
    whole = Pictures(folder, 8)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").unlink()
    table = io.StringIO()
    writer = csv.DictWriter(table, ["file_name", "text", "group"])
    writer.writeheader()
    writer.writerows({**row, "text": row["text"] + ', "quoted"'} for row in rows)
    (folder / "metadata.csv").write_text(mark + table.getvalue(), encoding="utf-8")
    data = Pictures(folder, 8)
    assert [data[index][1] for index in range(5)] == [f'number {index}, "quoted"' for index in range(5)]
    assert data.groups() == whole.groups() == [[0, 1], [2, 3], [4]]
    assert torch.equal(data[3][0], whole[3][0])


def test_pictures_of_any_size_and_mode_become_the_middle_square(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200  # the middle
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(picture(90, 20)).convert("L").save(tmp_path / "gray.jpg")
    Image.fromarray(picture(60, 5)).quantize().save(tmp_path / "palette.gif")
    names = ("wide.png", "gray.jpg", "palette.gif")
    lines(tmp_path, *({"file_name": name, "text": name} for name in names))
    data = Pictures(tmp_path, 10)
    for index, value in enumerate((200, 90, 60)):
        pixels = data[index][0]
        assert pixels.shape == (3, 10, 10) and pixels.dtype == torch.uint8
        assert (pixels.float() - value).abs().max() <= 2
    assert data.groups() == [[0], [1], [2]]  # each without a group stands alone


def test_a_picture_is_read_as_the_camera_held_it(tmp_path: Path) -> None:
    """As generation reads one that is handed in; and it is other data than the same bytes unturned."""
    lying = Image.new("RGB", (32, 32), "white")
    lying.paste("black", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter to the right brings it upright
    digests = set()
    for name, extra in (("turned", {"exif": exif}), ("plain", {})):
        folder = tmp_path / name
        folder.mkdir()
        lying.save(folder / "a.png", **extra)
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a corner"}) + "\n")
        pictures = Pictures(folder, 32)
        expected = torch.from_numpy(np.array(read_picture(folder / "a.png"))).permute(2, 0, 1)
        assert torch.equal(pictures[0][0], expected)
        digests.add(pictures.digest)
    assert pictures[0][0][0, 4, 4] == 0 and len(digests) == 2


def test_shards_as_img2dataset_writes_them(tmp_path: Path) -> None:
    """Its captions may be in the json alone, its keys come in any case, its pictures are jpg."""
    with tarfile.open(tmp_path / "00000.tar", "w") as shard:
        for key in ("000000000", "000000001"):
            jpeg = io.BytesIO()
            Image.fromarray(picture(100)).save(jpeg, "JPEG")
            described = {"caption": f"caption of {key}", "key": key, "status": "success", "width": 8}
            for name, content in ((f"{key}.JPG", jpeg.getvalue()), (f"{key}.json", json.dumps(described).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    data = Pictures(tmp_path, 8)
    assert [data[index][1] for index in range(2)] == ["caption of 000000000", "caption of 000000001"]


# --- what cannot be used ----------------------------------------------------------------------------------


def test_what_cannot_be_used_is_left_out_counted_and_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = (folder / "000" / "000000.png").read_bytes()
    (folder / "half.png").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_text("not a picture at all")
    (folder / "empty.png").write_bytes(b"")
    rows = [
        {"file_name": "000/000000.png", "text": "good"},
        {"file_name": "half.png", "text": "cut short"},
        {"file_name": "text.png", "text": "not a picture"},
        {"file_name": "empty.png", "text": "nothing"},
        {"file_name": "gone.png", "text": "no file"},
        {"file_name": "000/000001.png", "text": "  "},
        {"file_name": "000/000002.png"},
        {"file_name": "000/000002.png", "text": "half a pair \ud83d"},
        {"text": "no name"},
        {"file_name": "000/000003.png", "text": "good too"},
    ]
    lines(folder, *rows)
    with caplog.at_level(logging.WARNING):
        data = Pictures(folder, 8)
    assert [example.text for example in data.examples] == ["good", "good too"]
    counts = {"damaged picture": 3, "missing file": 1, "empty caption": 2, "damaged caption": 1}
    counts["row without file_name"] = 1
    assert data.skipped.counts == counts
    (record,) = caplog.records
    assert "3 skipped: damaged picture (first: half.png)" in record.getMessage()
    assert len(list(zip(data, range(2), strict=False))) == 2  # what is left can be read


def test_a_picture_too_large_to_be_meant_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture(1, 100)).save(folder / "large.png")
    rows = [{"file_name": "000/000000.png", "text": "a"}, {"file_name": "large.png", "text": "b"}]
    lines(folder, *rows)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert Pictures(folder, 8).skipped.counts == {"damaged picture": 1}


def test_damage_in_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", captioned(3))
    path = tmp_path / "data" / "00001.tar"
    with tarfile.open(path, "w") as shard:
        for name, content in (
            ("0.png", b"no picture"),
            ("0.txt", b"damaged"),
            ("1.txt", b"a caption alone"),
            ("2.png", b""),
            ("2.txt", b"\xff\xfe not utf-8"),
            ("3.png", b""),
            ("3.json", b"{not json"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    data = Pictures(tmp_path / "data", 8)
    assert len(data) == 3
    assert data.skipped.counts == {"damaged picture": 1, "sample without a picture": 1, "damaged caption": 2}
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"00001\.tar is not a whole tar file"):
        Pictures(tmp_path / "data", 8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b"{oops\n", "line 1 is not JSON"),
        ("metadata.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("metadata.jsonl", b'{"file_name": "\xff"}\n', "cannot be read"),
        ("metadata.csv", b"file_name,text\na.png,\xff\n", "cannot be read"),
        ("metadata.csv", b"image,caption\na.png,b\n", r"no usable picture in .*: 1 skipped: row without file_name"),
        ("metadata.jsonl", b"", "no rows"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "b"}\n', r"no usable picture in .*: 1 skipped: missing"),
        ("other.txt", b"", r"holds no data; give an image folder with metadata.jsonl or metadata.csv, or .tar shards"),
    ],
)
def test_data_without_any_use_is_an_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        Pictures(tmp_path, 8)


def test_all_damaged_is_an_error_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.training.tiny_recipes import recipes, written

    data = tmp_path / "data"
    data.mkdir()
    (data / "a.png").write_text("no picture")
    lines(data, {"file_name": "a.png", "text": "a"}, {"file_name": "a.png", "text": ""})
    recipe = written(recipes(data, tmp_path / "out")["vae"], tmp_path)
    assert command.main(["train", "vae", "--recipe", str(recipe)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no usable picture" in message and "1 skipped: damaged picture (first: a.png)" in message
    assert "1 skipped: empty caption" in message
    assert not (tmp_path / "out").exists()


# --- nothing half done ------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS)
def test_a_source_that_fails_midway_leaves_nothing(tmp_path: Path, write: Callable[..., int]) -> None:
    def failing() -> Iterator[Captioned]:
        yield from captioned(3)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write(tmp_path / "data", failing())
    assert list(tmp_path.iterdir()) == []
    assert write(tmp_path / "data", captioned(3)) == 3


@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_that_exists_is_never_touched(tmp_path: Path, write: Callable[..., int]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("mine")
    with pytest.raises(DataError, match="exists already; remove it or choose another folder"):
        write(tmp_path / "data", captioned(3))
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "mine"]


def test_data_shapes_writes_both_kinds_and_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["data", "shapes", str(tmp_path / "folder"), "--num", "5", "--seed", "3"]) == 0
    assert command.main(["data", "shapes", str(tmp_path / "shards"), "--num", "5", "--seed", "3", "--shards"]) == 0
    assert "wrote 5 pictures" in capsys.readouterr().out
    one, other = Pictures(tmp_path / "folder", 64), Pictures(tmp_path / "shards", 64)
    for index, (pixels, text, _) in enumerate(shapes(5, 3)):
        assert np.array_equal(one[index][0].permute(1, 2, 0), pixels) and one[index][1] == text
        assert torch.equal(other[index][0], one[index][0]) and other[index][1] == text
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "folder", tmp_path / "file" / "inside"):
        capsys.readouterr()
        assert command.main(["data", "shapes", str(place), "--num", "1"]) == 2
        assert str(place) in capsys.readouterr().err.strip().splitlines()[-1]


# --- the cache of what encoders say -----------------------------------------------------------------------


class Encoder:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        return pixels.float().mean(dim=(2, 3))


def test_the_cache_is_keyed_by_content_and_encoder(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "encoder"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"these weights")
    (weights / "config.json").write_text("{}")
    encode = Encoder()

    def ask() -> tuple[Tensor, bool]:
        before = encode.calls
        rows = encoded(Pictures(folder, 8), weights, encode, batch_size=2)
        return rows, encode.calls > before

    rows, computed = ask()
    assert computed and encode.calls == 3
    assert torch.equal(rows, torch.arange(5.0)[:, None].expand(5, 3))
    again, computed = ask()
    assert not computed and torch.equal(again, rows)
    Image.fromarray(picture(77)).save(folder / "000" / "000001.png")  # another picture
    changed, computed = ask()
    assert computed and changed[1, 0] == 77
    (weights / "model.safetensors").write_bytes(b"other weights")
    assert ask()[1]
    (weights / "config.json").write_text('{"scaling_factor": 2}')
    assert ask()[1]
    lines(folder, {"file_name": "000/000001.png", "text": "other words"})
    assert ask()[1]
    assert not ask()[1]
    assert encoded(Pictures(folder, 4), weights, encode).shape == (1, 3) and ask()[1] is False
    assert {path.suffix for path in (folder / ".cache").iterdir()} == {".safetensors"}


def test_data_that_cannot_be_written_beside_is_told_before_encoding(folder: Path, tmp_path: Path) -> None:
    (folder / ".cache").write_text("a file in the way")
    with pytest.raises(DataError, match=r"\.cache cannot be written .*; choose a folder that can"):
        encoded(Pictures(folder, 8), tmp_path, lambda pixels: pytest.fail("encoded all the same"))


def test_nothing_is_cached_when_encoding_fails(folder: Path, tmp_path: Path) -> None:
    def failing(pixels: Tensor) -> Tensor:
        raise RuntimeError("no memory left")

    with pytest.raises(RuntimeError, match="no memory left"):
        encoded(Pictures(folder, 8), tmp_path, failing)
    assert list((folder / ".cache").iterdir()) == []
