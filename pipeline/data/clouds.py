"""Point clouds in files: NumPy's `.npy` and `.npz`, `.ply` (ascii and binary), `.off` and text.

The format is told by a file's first bytes. Nothing is read that could run code: pickles are
refused, and NumPy reads without them. A cloud is an array of points [N, C], of 3 coordinates or of
6 numbers with a normal.
"""

from __future__ import annotations

import io
import re
import zipfile

import numpy as np

from pipeline.data.quoting import listing, shortened
from pipeline.errors import DataError

CLOUD_EXTENSIONS = ("npy", "npz", "ply", "off", "txt", "xyz", "csv", "pts")
MIN_POINTS = 8
MAX_POINTS = 10_000_000
SURFACE_POINTS = 8192
"""Points sampled from a mesh."""
_COLUMNS = ("x", "y", "z", "nx", "ny", "nz")
_PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2",
    "ushort": "u2", "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_CONVERT = (
    "convert it once, where you trust it: python -c \"import numpy as np; np.save('cloud.npy',"
    " np.load('cloud.pkl', allow_pickle=True))\""
)
_OTHER = (
    (rb"\x80[\x00-\x05]", f"a Python pickle, which may run code when it is read; {_CONVERT}"),
    (rb"\x89HDF", "an HDF5 file, which holds many clouds; give it as data of format hdf5"),
    (rb"# \.PCD", "a PCD file; convert it to .ply"),
    (rb"LASF", "a LAS file; convert it to .ply"),
    (rb"solid |\s*<\?xml|v [-0-9]|# *Blender", "a mesh in a format that is not read; save as .off"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ", "a compressed file; unpack it"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8", "an image; this task takes point clouds"),
)


def read_cloud(content: bytes, name: str) -> np.ndarray:
    """The points in a file, float64 [N, 3] or [N, 6]. Raises DataError naming `name`."""
    if not content:
        raise DataError(f"{name}: the file is empty, 0 bytes; copy it again")
    for pattern, what in _OTHER:
        if re.match(pattern, content):
            raise DataError(f"{name}: is {what}")
    try:
        if content.startswith(b"\x93NUMPY"):
            points = np.load(io.BytesIO(content), allow_pickle=False)
        elif content.startswith(b"PK"):
            points = _from_npz(content, name)
        elif re.match(rb"ply\s", content):
            points = _from_ply(content, name)
        elif re.match(rb"(ST)?C?N?OFF", content):
            points = _from_off(content.decode("ascii"), name)
        else:
            points = _from_text(content.decode("utf-8-sig"), name)
    except DataError:
        raise
    except Exception as error:  # as many kinds as there are ways to damage a file
        raise DataError(
            f"{name}: cannot be read ({shortened(str(error), 100)}); expected a whole file of"
            f" points: {', '.join(CLOUD_EXTENSIONS)}"
        ) from None
    return _checked(points, name)


def _checked(points: np.ndarray, name: str) -> np.ndarray:
    """The points as float64. Raises DataError unless they are a cloud."""
    if points.dtype.kind not in "fiu" or points.ndim != 2 or points.shape[1] not in (3, 6):
        raise DataError(
            f"{name}: an array of {points.dtype} {list(points.shape)}; expected numbers [N, 3], or"
            " [N, 6] with normals"
        )
    if not MIN_POINTS <= len(points) <= MAX_POINTS:
        raise DataError(
            f"{name}: {len(points):,} points; expected {MIN_POINTS} to {MAX_POINTS:,}"
            f"{'; thin it out' if len(points) > MAX_POINTS else ''}"
        )
    points = points.astype(np.float64)
    faulty = int((~np.isfinite(points)).any(axis=1).sum())
    if faulty:
        raise DataError(
            f"{name}: {faulty:,} of {len(points):,} points are not finite (NaN or infinite);"
            " remove them"
        )
    return points


def _from_npz(content: bytes, name: str) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        too_large = sum(each.file_size for each in archive.infolist()) > 8 * 6 * MAX_POINTS
    if too_large:
        raise DataError(f"{name}: unpacks to more than {MAX_POINTS:,} points; thin it out")
    arrays = np.load(io.BytesIO(content), allow_pickle=False)
    clouds = [key for key in arrays.files if arrays[key].ndim == 2]
    if len(clouds) != 1:
        raise DataError(
            f"{name}: {len(clouds)} arrays [N, 3] or [N, 6] among {listing(arrays.files)}; expected"
            " one"
        )
    points: np.ndarray = arrays[clouds[0]]
    return points


def _from_text(text: str, name: str) -> np.ndarray:
    """Lines of 3 or 6 numbers between spaces, commas, semicolons or tabs; a first line without
    numbers names the columns.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    rows = [re.split(r"[\s,;]+", line.strip().rstrip(",;")) for line in lines]
    if rows and not any(map(_is_number, rows[0])):
        rows = rows[1:]
    widths = sorted({len(row) for row in rows})
    if len(widths) > 1:
        odd = next(number for number, row in enumerate(rows, 1) if len(row) != len(rows[0]))
        raise DataError(
            f"{name}: point {odd} has {len(rows[odd - 1])} numbers, the first {len(rows[0])};"
            " expected as many in each line"
        )
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1 if rows else 3)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _from_ply(content: bytes, name: str) -> np.ndarray:
    """The vertices, with normals where they have some."""
    head, mark, body = content.partition(b"end_header")
    body = body[body.find(b"\n") + 1 :] if mark else b""
    lines = [line.split() for line in head.decode("ascii", errors="replace").splitlines()]
    form = next((line[1] for line in lines if line[:1] == ["format"]), None)
    elements = [line for line in lines if line[:1] == ["element"]]
    if not mark or form is None or not elements or elements[0][1] != "vertex":
        raise DataError(
            f"{name}: its PLY header is damaged, or does not begin with the vertices; save it again"
        )
    start = lines.index(elements[0]) + 1
    end = lines.index(elements[1]) if len(elements) > 1 else len(lines)
    properties = [line for line in lines[start:end] if line[:1] == ["property"]]
    count, names = int(elements[0][2]), [line[-1] for line in properties]
    wanted = _COLUMNS if set(_COLUMNS) <= set(names) else _COLUMNS[:3]
    if not set(wanted) <= set(names) or count > MAX_POINTS:
        raise DataError(
            f"{name}: {count:,} vertices with {listing(names)}; expected x, y, z of at most"
            f" {MAX_POINTS:,}"
        )
    if form == "ascii":
        rows = [line.split() for line in body.decode("ascii").splitlines()[:count]]
        columns = [np.array([float(row[names.index(key)]) for row in rows]) for key in wanted]
    else:
        order = "<" if form == "binary_little_endian" else ">"
        kind = np.dtype([(line[-1], order + _PLY_TYPES[line[1]]) for line in properties])
        table = np.frombuffer(body, kind, min(count, len(body) // kind.itemsize))
        columns = [table[key].astype(np.float64) for key in wanted]
    if len(columns[0]) < count:
        raise DataError(
            f"{name}: cut short: {len(columns[0]):,} of {count:,} vertices; copy it again"
        )
    return np.stack(columns, axis=1)


def _from_off(text: str, name: str) -> np.ndarray:
    """Points drawn from a mesh's faces, each as often as its area says; of a mesh without faces,
    its vertices.
    """
    numbers = re.sub(r"#.*", "", text).split()
    kind = numbers[0]
    if kind != "OFF":  # ModelNet40 has files whose first line is `OFF490 518 0`
        kind, numbers = "OFF", ["OFF", kind.removeprefix("OFF"), *numbers[1:]]
    vertices, faces = int(numbers[1]), int(numbers[2])
    if max(vertices, faces) > MAX_POINTS:
        raise DataError(f"{name}: {vertices:,} vertices and {faces:,} faces; simplify the mesh")
    corners = np.array(numbers[4 : 4 + 3 * vertices], dtype=np.float64).reshape(vertices, 3)
    triangles, at = [], 4 + 3 * vertices
    for _ in range(faces):
        size = int(numbers[at])
        face = [int(each) for each in numbers[at + 1 : at + 1 + size]]
        triangles += [(face[0], face[k], face[k + 1]) for k in range(1, size - 1)]
        at += 1 + size
    if not triangles:
        return corners
    a, b, c = (corners[index] for index in np.array(triangles).T)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if not area.sum() > 0:
        raise DataError(f"{name}: a mesh without area; expected faces of three corners or more")
    rng = np.random.default_rng(0)
    drawn = rng.choice(len(area), SURFACE_POINTS, p=area / area.sum())
    root, along = np.sqrt(rng.random((SURFACE_POINTS, 1))), rng.random((SURFACE_POINTS, 1))
    points: np.ndarray = (
        (1 - root) * a[drawn] + root * (1 - along) * b[drawn] + root * along * c[drawn]
    )
    return points
