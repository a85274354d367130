"""Read a benchmark's TSV file as VLMEvalKit does, without ever holding it: rows, and their pictures when asked for.

    table = read("data/MMStar.tsv", BENCHMARKS["MMStar"])       # once through the file
    for row in table:                                           # Row | Broken, in the file's order
        row.pictures()                                          # read again from its place in the file

A picture is base64, a list of base64 as text, the index of another row, or a file, see `place_of`. Rows without any are
left out, as there. What stands in base64 goes through a JPEG file of quality 75 first, which VLMEvalKit shows models.
Source: VLMEvalKit vlmeval/dataset/image_base.py:55-130, vlmeval/smp/vlm.py:90-115 @00e0cf87.
"""
from __future__ import annotations

import ast
import base64
import binascii
import hashlib
import io
import os
import random
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from minivl.limits import InputError, Limits, clip, is_there, reading
from minivl.media import load_image
from minivl.media.pictures import translated
from weights_tools.evaluate import cells
from weights_tools.evaluate.benchmarks import BENCHMARKS, MISSING, Benchmark, Broken, Row

PICTURES = ("image", "image_path")
LONGEST_INDEX = 64      # characters in place of a picture; a longer text is one
LONG = "a picture in base64, or paths;" * 3     # in its place, while only the others' cells matter
ROTATIONS = 10**6       # added to the index of a circular question with its options in another order
# The released files, at the card's time and, where another was released since, today.
MD5 = {"MMBench_DEV_EN_V11": ("30c05be8f2f347a50be25aa067248184",),
       "MMBench_TEST_EN_V11": ("26f0f15381a21720255091d3e0316ce6", "8d1a704e791df6f5d9fb3ef782b65365"),
       "MMBench_TEST_CN_V11": ("74bbe4556dac745613c7cbe5ad787050", "156e6569f9547afb16603eca16e85373"),
       "MMStar": ("e1ecd2140806c1b1bbf54b43372efb9e",),
       "MMMU_DEV_VAL": ("521afc0f3bf341e6654327792781644d", "585e8ad75e73f75dcad265dfd0417d64"),
       "MathVista_MINI": ("f199b98e178e5a2a20e7048f5dcb0464",),
       "HallusionBench": ("0c23ac0dc9ef46832d7a24504f2a0c7c",), "AI2D_TEST": ("0f593e0d1c7df9a3d69bf1f947e71975",),
       "OCRBench": ("e953d98a987cc6e26ef717b61260b778",), "MMVet": ("748aa6d4aa9d4de798306a63718455e3",)}


@dataclass(frozen=True)
class Source:
    """A file whose header was read."""
    path: Path
    benchmark: Benchmark
    columns: tuple[str, ...]
    start: tuple[int, int]          # where its rows begin: byte, line
    stamp: tuple[int, int]          # size and time, which tell it from a changed one

    @property
    def pictures(self) -> tuple[int, ...]:
        """The columns of pictures, by number."""
        return tuple(k for k, column in enumerate(self.columns) if column in PICTURES)

    def same(self) -> io.BufferedReader:
        """Open the file again. Raises InputError if it was changed: places in it would be wrong."""
        with reading(self.path):
            file = open(self.path, "rb")        # noqa: SIM115  closed by the caller
        if stamp(file) != self.stamp:
            file.close()
            raise InputError(f"{self.path} was changed while it was in use; start again")
        return file


class Table:
    """The rows of a file: iterate over it, once or several times, or `pick` some.

    dataset: its name. md5: of the file; released: whether that is a known one, None where none is known.
    dropped: how many rows have no picture and are left out. len(table): how many are not, broken ones among them.
    """

    def __init__(self, source: Source):
        self.source = source
        self.path = source.path
        self.benchmark = source.benchmark
        self.dataset = source.path.stem
        self.columns = source.columns
        self.dropped = 0
        self._types = [cells.Column() for _ in source.columns]
        self._lines = array("q")
        self._offsets = array("q")
        self._broken: dict[int, str] = {}           # number of a row -> why
        self._indexes: list[str] = []               # as they stand in the file
        self._numbers: dict[str, int] = {}          # index -> number of its row
        self._elsewhere: dict[int, str] = {}        # number of a row -> index of that which has its picture
        self._strata: list[str | None] = []
        self.md5 = self._scan()
        known = MD5.get(self.dataset)
        self.released = self.md5 in known if known else None
        self._number()
        self._resolve()

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[Row | Broken]:
        return self.pick(range(len(self)))

    def pick(self, numbers: Iterable[int]) -> Iterator[Row | Broken]:
        """Yield rows by their number in the file, from 0; left out ones are not counted."""
        with self.source.same() as file:
            for number in numbers:
                if number in self._broken:
                    yield Broken(self._index(number), self._lines[number], self._broken[number])
                else:
                    yield self._row(number, file)

    def sample(self, n: int, seed: int = 0) -> list[int]:
        """Draw n questions for `pick`, of each category its share; of a circular question all its rows.

        Of HallusionBench whole sets, with about n questions: a figure with one question of its five is right more
        often, so the score of single ones would be too high (nano: 92 for 87). Where the number of the benchmark comes
        from one split of the file, of that one. Seeded; in the file's order.
        """
        units = defaultdict(list)
        for number, stratum in enumerate(self._strata):
            if number in self._broken or stratum is not None:
                units[self._unit(number)].append(number)
        if self.benchmark.kind == "yes_no":
            n = max(1, n * len(units) // sum(map(len, units.values())))
        strata = defaultdict(list)
        for unit in units.values():
            strata[self._strata[unit[0]] or ""].append(unit)
        draw = random.Random(seed)
        order = sorted(strata)
        draw.shuffle(order)         # which of equal categories are in a small sample
        for name in order:
            draw.shuffle(strata[name])
        shares = divide(n, {name: len(strata[name]) for name in order})
        return sorted(number for name, share in shares.items() for unit in strata[name][:share] for number in unit)

    # ---- once through the file --------------------------------------------------------------------------------------

    def _scan(self) -> str:
        """Find the rows' places, what their columns have in common, and the file's md5."""
        start, line = self.source.start
        bar = tqdm(total=self.source.stamp[0], unit="B", unit_scale=True, desc=f"reading {self.path.name}", leave=False,
                   disable=None)
        with self.source.same() as file, bar, reading(self.path):
            file.seek(start)
            for raw in cells.rows(file, len(self.columns), self.source.pictures, line):
                self._see(raw)
                bar.update(file.tell() - bar.n)
            file.seek(0)
            md5 = hashlib.md5(usedforsecurity=False)
            while part := file.read(2**16):
                md5.update(part)
        if len(self._broken) == len(self):
            why = f"line {self._lines[0]}: {self._broken[0]}" if self._broken else (
                f"{self.dropped} without a picture" if self.dropped else "it has only a header")
            raise InputError(f"{self.path} has no row that can be read ({why}); check how it was written: tabs between "
                             "the cells, UTF-8, quotes doubled")
        return md5.hexdigest()

    def _see(self, raw: cells.Raw):
        """Take in one row."""
        why = raw.why
        texts = {}
        for column, cell in zip(self.columns, raw.cells):
            try:
                long = column in PICTURES and len(cell) > 4 * LONGEST_INDEX      # bytes of characters
                texts[column] = LONG if long else cell.decode("utf-8")
            except UnicodeDecodeError:
                texts[column] = None
                why = why or f"its {column} is not UTF-8"
        if not why:
            for column, kind in zip(self.columns, self._types):
                # A row without an index is broken; it does not make the others decimals.
                if column not in PICTURES and not (column == "index" and texts["index"] in MISSING):
                    kind.see(texts[column])
        picture = texts.get("image" if "image" in self.columns else "image_path")
        if not why and picture in MISSING:
            self.dropped += 1
            return
        number = len(self)
        index = texts.get("index")
        self._lines.append(raw.line)
        self._offsets.append(raw.offset)
        self._indexes.append("" if index is None else index)
        why = why or next((f"it has no {name}" for name in ("index", "question") if texts[name] in MISSING), None)
        if why:
            self._broken[number] = why
        elif "image" in self.columns and len(picture) <= LONGEST_INDEX:
            self._elsewhere[number] = picture
        self._strata.append(None if why else self._stratum(texts))

    def _stratum(self, texts: dict) -> str | None:
        """Name what a row is drawn with; None if it is of a split that does not count."""
        if self.benchmark.split and texts.get("split", self.benchmark.split) != self.benchmark.split:
            return None
        return f"{texts.get('l2-category', '')}\n{texts.get('category', '')}"

    def _number(self):
        """Find the row of each index. The second row with the same one is broken."""
        for number in range(len(self)):
            if number in self._broken:
                continue
            index = str(self._index(number))
            if index in self._numbers:
                first = self._lines[self._numbers[index]]
                self._broken[number] = f"its index {clip(index)} is that of line {first} too"
            else:
                self._numbers[index] = number

    def _resolve(self):
        """Look up whose picture a row has, over several rows if need be."""
        for number, index in list(self._elsewhere.items()):
            seen = {number}
            at = self._numbers.get(index)
            while at in self._elsewhere and at not in seen:
                seen.add(at)
                at = self._numbers.get(self._elsewhere[at])
            if at is None or at in seen:
                self._broken.setdefault(number, f"its image is {index!r}, neither a picture in base64 nor an index "
                                                "that leads to one")

    # ---- rows -------------------------------------------------------------------------------------------------------

    def _index(self, number: int) -> int | str | None:
        """Read an index as the original has it: a number if all are whole numbers, else text."""
        text = self._indexes[number]
        column = self._types[self.columns.index("index")]
        try:
            return None if text in MISSING else int(text) if column.whole else column.read(text)
        except ValueError:      # of a broken row
            return text

    def _unit(self, number: int):
        """Name the question a row belongs to, where it has several rows; else the row."""
        index = self._index(number)
        if self.benchmark.circular and isinstance(index, int):
            return index % ROTATIONS
        parts = str(index).split("_")
        if self.benchmark.kind == "yes_no" and len(parts) > 5 and number not in self._broken:
            return "set", self._strata[number].partition("\n")[0], parts[3]        # as score reads it
        return "row", number

    def _row(self, number: int, file: io.BufferedReader) -> Row:
        found = cells.one(file, self._offsets[number], self.source.pictures)
        fields = {column: kind.read(cell.decode("utf-8"))
                  for column, kind, cell in zip(self.columns, self._types, found)
                  if column not in PICTURES and column != "index"}
        whose = number
        while whose in self._elsewhere:
            whose = self._numbers[self._elsewhere[whose]]
        index = self._index(number)
        return Row(index, fields, partial(pictures, self.source, self._offsets[whose], index), self._lines[number])


def read(path: str | os.PathLike, benchmark: Benchmark) -> Table:
    """Read a benchmark's file once. Raises InputError where it cannot be one: a column missing, no row that is whole.

    The file's name says the dataset, which decides how pictures are shown.
    """
    path = Path(path)
    if not is_there(path):
        raise InputError(f"{path} is not there; put the file there")
    with reading(path), open(path, "rb") as file:
        names, lines = cells.header(file)
        source = Source(path, benchmark, _columns(path, names), (file.tell(), lines + 1), stamp(file))
    check_columns(source)
    return Table(source)


def _columns(path: Path, names: list[bytes]) -> tuple[str, ...]:
    try:
        columns = tuple(name.decode("utf-8") for name in names)
    except UnicodeDecodeError:
        columns = ()
    if not columns:
        raise InputError(f"{path} does not begin with a line of columns, in UTF-8 with tabs between them; save it so")
    twice = [name for k, name in enumerate(columns) if name in columns[:k]]
    if twice:
        raise InputError(f"{path} has the column {clip(twice[0])} twice; take one out")
    return columns


def check_columns(source: Source):
    """Refuse a file that lacks columns; say which, and which benchmark it looks like."""
    missing = lacks(source.columns, source.benchmark)
    if missing:
        raise InputError(f"{source.path} lacks the columns {', '.join(missing)} of {source.benchmark.name} and has "
                         f"{clip(', '.join(source.columns))}; {_guess(source)}")


def _guess(source: Source) -> str:
    """Say what a file without the columns of its benchmark may be."""
    if len(source.columns) == 1:
        return "write it with tabs between the cells"
    nearest = min(BENCHMARKS.values(), key=lambda one: (len(lacks(source.columns, one)), -len(one.columns)))
    lacking = lacks(source.columns, nearest)
    if nearest.name == source.benchmark.name.removeprefix("Nano"):
        return "take the file as released"
    return (f"nearest is {nearest.name}, for which it lacks {', '.join(lacking)}" if lacking else
            f"by its columns it may be {nearest.name}")


def lacks(columns: tuple[str, ...], benchmark: Benchmark) -> list[str]:
    """List what a benchmark needs and columns do not have."""
    needed = ["index", "question", *benchmark.columns]
    return [name for name in needed if name not in columns] + (
        [] if any(name in columns for name in PICTURES) else ["image (or image_path)"])


def divide(n: int, sizes: dict) -> dict:
    """Divide n over groups by their sizes, whole numbers by largest remainders: 3 over 5 and 1 are 3 and 0."""
    total = sum(sizes.values())
    n = min(n, total)
    shares = {name: n * size // total for name, size in sizes.items()}
    rest = sorted(sizes, key=lambda name: -(n * sizes[name] % total))[:n - sum(shares.values())]
    return {name: share + (name in rest) for name, share in shares.items()}


def stamp(file: io.BufferedReader) -> tuple[int, int]:
    """Tell an open file from a changed one."""
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns


# ---- pictures -------------------------------------------------------------------------------------------------------

def pictures(source: Source, offset: int, index: int | str) -> list[Image.Image]:
    """Open the pictures of the row at an offset, in order. Raises InputError: the file, `index`, which picture, why."""
    with source.same() as file, reading(source.path):
        found = dict(zip(source.columns, cells.one(file, offset, source.pictures)))
    texts = {name: listed(found[name].decode("utf-8", "replace")) for name in PICTURES if name in found}
    given = texts["image" if "image" in texts else "image_path"]
    most = Limits().pictures
    if not 1 <= len(given) <= most:
        raise InputError(f"{source.path}, index {index}: it has {len(given)} pictures, which must be 1 to {most}; take "
                         "the row out")
    names = texts.get("image_path", []) if len(given) > 1 else []
    opened = []
    for number, text in enumerate(given):
        try:
            if "image" in texts:
                name = names[number] if number < len(names) else f"{index}.jpg"
                opened.append(as_shown(load_image(decoded(text)), name, source))
            else:
                opened.append(load_image(place_of(text, source), allow_urls=False))
        except InputError as error:
            raise InputError(f"{source.path}, index {index}, picture {number + 1} of {len(given)}: {error}") from None
    return opened


def listed(cell: str) -> list[str]:
    """Take a cell apart: a Python list as text, or one value."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return [] if cell in MISSING else [cell]
    try:
        found = ast.literal_eval(cell)
        return [str(value) for value in found] if isinstance(found, list) else [cell]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return [cell]


def decoded(text: str) -> bytes:
    """Decode base64; characters that do not belong are passed over, as there."""
    most = Limits().picture_bytes
    if len(text) > most * 3 // 2:
        raise InputError(f"it has {len(text)} characters of base64, the limit is {most} bytes; make it smaller")
    try:
        return base64.b64decode(text)
    except (binascii.Error, ValueError):
        raise InputError(f"{clip(text, 20)!r} is no base64; write the picture anew") from None


def as_shown(image: Image.Image, name: str, source: Source) -> Image.Image:
    """Send a picture through the file `name`, in which VLMEvalKit shows it to models. nano's own are as they are."""
    if source.path.stem.startswith("Nano") or not name.lower().endswith((".jpg", ".jpeg")):
        return image
    file = io.BytesIO()
    with translated(name, f"a picture of {image.width}x{image.height} cannot be a JPEG file; make it smaller"):
        image.save(file, "JPEG")
    return load_image(file.getvalue())


def place_of(text: str, source: Source) -> Path:
    """Find a picture's file: in images/DATASET or images/BENCHMARK beside the TSV, or beside it; never outside."""
    root = source.path.parent.absolute()
    folders = (root / "images" / source.path.stem, root / "images" / source.benchmark.name, root)
    places = [Path(os.path.normpath(folder / text)) for folder in folders]
    inside = [place for place in places if Path(os.path.normpath(root)) in place.parents]
    if not inside:
        raise InputError(f"{clip(text)!r} lies outside {root}; put the pictures below that folder")
    there = next((place for place in inside if os.path.isfile(place)), None)
    if there is None:
        raise InputError(f"{clip(text)!r} is in none of {', '.join(map(str, folders))}; put it into the first")
    return there
