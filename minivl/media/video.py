"""Choose frames of a video and read them as RGB PIL images: video files, animations, folders and lists of pictures."""
from __future__ import annotations

import bisect
import contextlib
import math
import numbers
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from PIL import Image

from minivl.limits import InputError, Limits
from minivl.media.local import check_bytes, file_size, local_path, read_file
from minivl.media.parts import check_animation, check_memory
from minivl.media.pictures import (
    FORMAT_NAMES,
    MAGIC,
    SUFFIXES,
    check_size,
    load_image,
    open_picture,
    to_rgb,
    translated,
)
from minivl.media.tables import check_tables

ANIMATED = ("GIF", "WEBP", "PNG")       # not TIFF or MPO (phone JPEG): their further pictures are pages or previews
# Containers ffmpeg may open. Playlists (hls, concat, dash, ...) are left out: they make ffmpeg open other files.
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
TOTAL_FRAMES = 1_000_000                # of a whole video, chosen or not: about nine hours at 30 frames per second
# Unlike EXIF in pictures, the display matrix phones write IS applied to videos: the reference's reader (decord) turns
# by its angle. It knows no mirror, so it shows a front camera's video upside down; here it is mirrored, as players do.
# Signs of (a, b, c, d), for x' = a x + c y and y' = b x + d y, y downwards -> what brings the frame there.
TURNS = {(1, 0, 0, 1): None,
         (0, 1, -1, 0): Image.Transpose.ROTATE_270, (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
         (0, -1, 1, 0): Image.Transpose.ROTATE_90, (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
         (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM, (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
         (0, -1, -1, 0): Image.Transpose.TRANSVERSE}
RGB_BYTES = 4                           # of a pixel in Pillow's memory
# Decoders that are used, of ffmpeg's hundreds; of sound and subtitles none.
CODECS = ("h264,hevc,vp8,vp9,libdav1d,av1,mpeg4,mpeg1video,mpeg2video,mjpeg,h263,flv,msmpeg4v1,msmpeg4v2,msmpeg4,wmv1,"
          "wmv2,wmv3,vc1,theora,prores,dnxhd,ffv1,rawvideo")
SOUGHT = re.compile("mp4|matroska")     # containers whose tables find a key frame
ONE_FRAME = ("h264", "hevc", "vp9", "libdav1d", "av1")      # codecs of which each packet is a frame to be shown
MOST_STREAMS = 64                       # of a container: films have some thirty of sound and subtitles
PACKET_WORK = 400                       # pixels, in whose time a packet is read; one more for each pixel decoded
BYTE_WORK = 30                          # pixels, in whose time a byte is decoded
DECODER_BYTES = 38                      # of memory for a pixel: 16 frames kept for reference and 4 being made, and RGB
READ_BETWEEN = 64 * 2**20               # bytes of a container between two packets
SEEK_BYTES = 2**12                      # counted for a read or a seek, however few bytes it gives


def frame_indices(max_frame: int, fps: float | None, num_segments: int, bound: Sequence[float] | None = None, *,
                  limits: Limits = Limits()) -> list[int]:
    """Choose the frames that stand for a video: the middle of each of `num_segments` equal parts, rounded as in the
    reference.

    max_frame: index of the last frame; fps: frames per second (may be None without bound);
    bound: None for the whole video, or (start, end) in seconds. Returns a list of indices. Raises InputError.
    """
    fps, bound = _check_choice(fps, num_segments, bound, limits)
    if isinstance(max_frame, bool) or not isinstance(max_frame, int) or max_frame < 0:
        raise InputError(f"max_frame, the index of the last frame, must be an int >= 0, not {max_frame!r}")
    first = 0
    last = max_frame
    if bound is not None or fps is not None:
        start, end = bound or (-100_000, 100_000)       # seconds; the reference's "everything"
        first = max(0, round(start * fps))              # round: half to even
        last = min(round(end * fps), max_frame)
    if last < first:
        raise InputError(f"bound {start:g}..{end:g} seconds lies outside the video, which has {max_frame + 1} frames "
                         f"= {(max_frame + 1) / fps:g} seconds at {fps:g} frames per second")
    part = (last - first) / num_segments
    return [int(first + part / 2 + round(part * k)) for k in range(num_segments)]


def _check_choice(fps: float | None, num_segments: int, bound: Sequence[float] | None,
                  limits: Limits) -> tuple[float | None, tuple[float, float] | None]:
    """Check what can be checked before there is a video; return (fps, bound) as floats, None where not given."""
    if isinstance(num_segments, bool) or not isinstance(num_segments, int) or num_segments < 1:
        raise InputError(f"num_segments, the number of frames to take, must be an int >= 1, not {num_segments!r}")
    if num_segments > limits.video_frames:
        raise InputError(f"num_segments is {num_segments}, the limit is {limits.video_frames} frames of one video; "
                         "take fewer or raise Limits(video_frames=...)")
    if fps is not None:
        fps = _finite(fps, "fps")
        if not 0 < fps <= 1e6:
            raise InputError(f"fps must be above 0 and at most 1e6 frames per second, not {fps:g}")
    if bound is None:
        return fps, None
    if not isinstance(bound, (tuple, list)) or len(bound) != 2:
        raise InputError(f"bound must be None or (start, end) in seconds, not {str(bound)[:80]!r}")
    start = _finite(bound[0], "the start of bound")
    end = _finite(bound[1], "the end of bound")
    if end < start or max(abs(start), abs(end)) > 1e9:
        raise InputError(f"bound {start:g}..{end:g} seconds must not end before it starts, nor go past 1e9")
    if fps is None:
        raise InputError("bound is in seconds, and this video does not say its frames per second; pass fps=... too")
    return fps, (start, end)


def _finite(value: object, what: str) -> float:
    """Make a finite float of a number. Raises InputError for anything else."""
    with contextlib.suppress(OverflowError):            # an int too large for float
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    raise InputError(f"{what} must be a finite number, not {str(value)[:80]!r}")


def load_video(source: str | os.PathLike | Sequence, *, num_segments: int = 8, bound: Sequence[float] | None = None,
               fps: float | None = None, limits: Limits = Limits(), allow_paths: bool = True) -> list[Image.Image]:
    """Read `num_segments` frames of a video as RGB PIL images, chosen by `frame_indices`.

    source: a video file (MP4, MOV, MKV, WebM, AVI, ...; needs PyAV, the extra "video"), an animated GIF, WebP or PNG,
    a folder of pictures (frame2 comes before frame10), or a list of pictures (as `load_image` takes, without URLs).
    bound: (start, end) in seconds; fps: frames per second, in place of what the file says (folders and lists say
    nothing). Files are bounded by limits.video_bytes, animations by limits.picture_bytes too. Raises InputError.
    """
    _check_choice(1.0 if fps is None else fps, num_segments, bound, limits)     # before opening anything

    def choose(total, rate):
        _check_total(total, name)
        return frame_indices(total - 1, rate if fps is None else fps, num_segments, bound, limits=limits)

    if isinstance(source, (list, tuple)):
        name = "the list of frames"
        return _listed_frames(source, choose(len(source), None), name, limits, allow_paths)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"a video cannot be a {type(source).__name__}; give the path of a video file or of a folder "
                         "of pictures, or a list of PIL images")
    if isinstance(source, str) and re.match("(https?|data):", source, re.IGNORECASE):
        raise InputError("videos are read from local files only, not from URLs; download the file first")
    path, name = local_path(source, allow_paths)
    if os.path.isdir(path):
        paths = _folder_frames(path, name)
        return _listed_frames(paths, choose(len(paths), None), name, limits, True)
    check_bytes(file_size(path, name), limits.video_bytes, "video_bytes", name)
    try:
        with open(path, "rb") as file:
            picture = MAGIC.match(file.read(16))
    except OSError:
        raise InputError(f"{name} cannot be read; check its permissions") from None
    if picture or path.lower().endswith(SUFFIXES):
        return _animation_frames(read_file(path, name, limits), choose, bound is not None and fps is None, name,
                                 limits)
    return _container_frames(path, choose, name, limits)


def _check_total(total: int, name: str) -> None:
    """Refuse a video without frames, or with too many to walk through."""
    if total < 1:
        raise InputError(f"{name} holds no frames (0): nothing was given, or the video is cut short")
    if total > TOTAL_FRAMES:
        raise InputError(f"{name} has {total} frames or more, the limit is {TOTAL_FRAMES}; cut the video")


def _collect(frames: Iterable[tuple[int, Image.Image]], name: str, limits: Limits) -> dict[int, Image.Image]:
    """Collect pairs (index, image), made one by one, and bound the memory they take together."""
    kept = {}
    taken = 0
    for index, image in frames:
        kept[index] = image
        taken += RGB_BYTES * image.width * image.height
        if taken > limits.decoding_bytes:
            raise InputError(f"{name}: the first {len(kept)} frames taken hold {taken} bytes, the limit for all is "
                             f"{limits.decoding_bytes}; take fewer or smaller ones, or raise "
                             "Limits(decoding_bytes=...)")
    return kept


def _listed_frames(sources: Sequence, indices: list[int], name: str, limits: Limits,
                   allow_paths: bool) -> list[Image.Image]:
    """Open the chosen frames of a list of pictures, and no others."""
    def frames():
        left = limits.decoding_bytes
        for index in sorted(set(indices)):
            image = load_image(sources[index], limits=replace(limits, decoding_bytes=left), allow_paths=allow_paths,
                               allow_urls=False)
            yield index, image
            left -= RGB_BYTES * image.width * image.height

    kept = _collect(frames(), name, limits)
    return [kept[index] for index in indices]


def _folder_frames(folder: str, name: str) -> list[str]:
    """List the paths of the pictures in a folder, in natural order; hidden files (.name) are ignored."""
    try:
        names = [entry for entry in os.listdir(folder) if not entry.startswith(".")]
    except OSError:
        raise InputError(f"{name} cannot be listed; check its permissions") from None
    if not names:
        raise InputError(f"{name} is an empty folder; put the frames in it as pictures ({FORMAT_NAMES})")
    for entry in names:         # skipping it silently would shift the frames, should it be one in another format
        if not entry.lower().endswith(SUFFIXES):
            raise InputError(f"{name} holds {entry!r}, which is not a picture ({FORMAT_NAMES}); keep only frames in it")
    names.sort(key=lambda entry: ([int(part) if part.isdigit() else part.lower()
                                   for part in re.split("([0-9]+)", entry)], entry))
    return [os.path.join(folder, entry) for entry in names]


def _animation_frames(data: bytes, choose: Callable[[int, float | None], list[int]], need_rate: bool, name: str,
                      limits: Limits) -> list[Image.Image]:
    """Read the chosen frames of a GIF, WebP or PNG animation, each as Pillow composes it; a still is one frame."""
    image, parts = open_picture(data, name, limits)
    damaged = "the animation is cut short or damaged; save or download it again"
    with translated(name, damaged):
        total = image.n_frames if image.format in ANIMATED and hasattr(image, "n_frames") else 1
    # An animated PNG may begin with a still for viewers that cannot animate; it is not part of the animation.
    skip = 1 if total > 1 and image.info.get("default_image") else 0
    if total > 1:
        check_animation(parts, total * (2 if need_rate else 1), 0, name, limits)     # for the rate all are drawn once
    total -= skip

    def go_to(index):
        with translated(name, damaged):
            image.seek(index + skip)
        check_size(*image.size, f"frame {index} of {name}", limits)      # a GIF may grow on the way

    rate = None
    if need_rate:
        _check_total(total, name)
        duration = 0.0          # milliseconds
        for index in range(total):
            go_to(index)
            with translated(name, damaged):
                image.load()    # WebP says the duration only now
                duration += image.info.get("duration", 0)
        if not 0 < duration < math.inf:
            raise InputError(f"{name} does not say how long its frames are shown; pass fps=... with bound")
        rate = 1000 * total / duration
    indices = choose(total, rate)
    if total > 1:
        check_animation(parts, total, len(set(indices)), name, limits)

    def frames():
        for index in sorted(set(indices)):
            go_to(index)
            yield index, to_rgb(image, f"frame {index} of {name}")

    kept = _collect(frames(), name, limits)
    return [kept[index] for index in indices]


def _container_frames(path: str, choose: Callable[[int, float | None], list[int]], name: str,
                      limits: Limits) -> list[Image.Image]:
    """Read the chosen frames of an MP4, MKV, ... in the order shown, through PyAV."""
    work = Work(name, limits)
    with _opened_video(path, name, limits) as (container, stream, file):
        rate = stream.average_rate if stream.average_rate and stream.average_rate <= 1e6 else None
        packets = []                                # counted, because headers may not say or be wrong
        for packet in container.demux():
            file.start_again()
            work.add(PACKET_WORK)
            if packet.stream_index == stream.index and packet.size > 0 and not packet.is_discard:
                packets.append((packet.pts, packet.is_keyframe))
                if len(packets) > TOTAL_FRAMES:
                    break
        indices = choose(len(packets), rate)
        # An MP4 lists where each frame lies: beyond the end of the file means that the end is missing.
        end = max((entry.pos + entry.size for entry in getattr(stream, "index_entries", ())), default=0)
        size = os.path.getsize(path)
        if "mp4" in container.format.name and end > size:
            raise InputError(f"{name}: the video is cut short, it has {size} of {end} bytes; download it again")
        pixels = stream.codec_context.width * stream.codec_context.height
        frames = len(set(indices))
        check_memory(pixels * (DECODER_BYTES + RGB_BYTES * frames), f"{frames} frames of {name}", limits)
    kept = _sought_frames(path, packets, sorted(set(indices)), work, name, limits)
    if kept is None:
        seen, kept = _decode_frames(path, set(indices), work, name, limits)
        if max(indices) not in kept:                # fewer frames than packets: choose again from those there are
            indices = choose(seen, rate)
            seen, kept = _decode_frames(path, set(indices), work, name, limits)
    return [kept[index] for index in indices]


class Work:
    """Count what reading a video takes, in the time of a plain JPEG's pixel."""

    def __init__(self, name: str, limits: Limits):
        self.name, self.limit, self.done = name, limits.video_work, 0
        self.kept = 0       # bytes of the frames taken

    def add(self, work: int) -> None:
        """Add some. Raises InputError past the limit."""
        self.done += work
        if self.done > self.limit:
            raise InputError(f"{self.name}: reaching the frames taken is more work than decoding {self.limit} pixels, "
                             "the limit; take fewer frames, cut the video or make it smaller, or raise "
                             "Limits(video_work=...)")


def _sought_frames(path: str, packets: list[tuple], needed: list[int], work: Work, name: str,
                   limits: Limits) -> dict[int, Image.Image] | None:
    """Decode only from the key frame before each of `needed`: {index: RGB image}.

    packets: (time it is shown, is key frame) of each, in the order stored. None where times are missing or given twice,
    or the decoder shows other frames than those: then only decoding from the start tells which is which.
    """
    times = [time for time, _ in packets]
    if None in times or len(set(times)) < len(times):
        return None
    order = sorted(range(len(times)), key=times.__getitem__)
    keys = [place for place, (_, is_key) in enumerate(packets) if is_key]
    groups = {}
    for index in needed:
        place = bisect.bisect_right(keys, order[index]) - 1
        while place >= 0 and times[keys[place]] > times[order[index]]:      # shown before the key frame it follows
            place -= 1
        if place < 0:
            return None
        groups.setdefault(keys[place], []).append(index)

    def frames(container, stream, file):
        for key, wanted in sorted(groups.items()):
            left = {times[order[index]]: index for index in wanted}
            if key:
                container.seek(times[key], stream=stream)
            for frame in _decoded(container, stream, file, work, name, limits):
                if frame.pts is None or frame.pts > min(left):
                    raise _OtherFrames
                if frame.pts in left:
                    index = left.pop(frame.pts)
                    yield index, _shown(frame, f"frame {index} of {name}", work)
                if not left:
                    break
            if left:
                raise _OtherFrames

    try:
        with _opened_video(path, name, limits) as (container, stream, file):
            if not SOUGHT.search(container.format.name) or stream.codec_context.name not in ONE_FRAME:
                return None
            return _collect(frames(container, stream, file), name, limits)
    except _OtherFrames:
        return None


class _OtherFrames(InputError):
    """The frames that a decoder shows are not those that the packets announce."""


def _decode_frames(path: str, needed: set[int], work: Work, name: str,
                   limits: Limits) -> tuple[int, dict[int, Image.Image]]:
    """Decode from the start to the last of `needed`; return (number of frames seen, {index: RGB image})."""
    seen = 0

    def frames(container, stream, file):
        nonlocal seen
        for frame in _decoded(container, stream, file, work, name, limits):
            if seen in needed:
                yield seen, _shown(frame, f"frame {seen} of {name}", work)
            seen += 1
            if seen > max(needed):
                return

    with _opened_video(path, name, limits) as (container, stream, file):
        kept = _collect(frames(container, stream, file), name, limits)
    return seen, kept


def _decoded(container, stream, file: _Counted, work: Work, name: str, limits: Limits) -> Iterator:
    """Decode PyAV's frames from where the container stands; the size of each is checked, as it may change."""
    for packet in container.demux(stream):
        file.start_again()
        work.add(PACKET_WORK + BYTE_WORK * packet.size)
        for frame in packet.decode():
            check_size(frame.width, frame.height, f"a frame of {name}", limits)
            pixels = frame.width * frame.height
            work.add(pixels)
            check_memory(pixels * DECODER_BYTES + work.kept, f"a frame of {name}", limits)
            yield frame


def _shown(frame, label: str, work: Work) -> Image.Image:
    """Make an RGB image of PyAV's `frame`, turned as it is to be shown."""
    if frame.is_corrupt:
        raise InputError(f"{label} is damaged; save or download the video again")
    image = frame.to_image()
    work.kept += RGB_BYTES * frame.width * frame.height
    turn = _turn(frame)
    return image if turn is None else image.transpose(turn)


def _turn(frame) -> Image.Transpose | None:
    """Read how PyAV's `frame` is to be turned or mirrored; None: as it is, also at an angle between the axes."""
    stored = frame.side_data.get("DISPLAYMATRIX")       # nine int32: a b u, c d v, x y w
    if stored is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(stored))
    least = max(map(abs, (a, b, c, d))) / 100           # what is left of cos 90 degrees is no direction
    return TURNS.get(tuple((value > least) - (value < -least) for value in (a, b, c, d)))


class _Counted:
    """A file for ffmpeg that ends when too much of it was read for nothing: tables without end, resynchronizing, ...

    Between two packets lies at most one packet; before the first, the tables that say where they are, which ffmpeg
    keeps in memory.
    """

    def __init__(self, file):
        self.file = file
        self.tell = file.tell
        self.start_again()

    def start_again(self) -> None:
        """Allow as much again: a packet came."""
        self.left = READ_BETWEEN

    def read(self, size: int = -1) -> bytes:
        """Read, as a file does."""
        found = self.file.read(size)
        self.left -= len(found) + SEEK_BYTES
        return found if self.left >= 0 else b""

    def seek(self, *where: int) -> int:
        """Go to a place, as a file does."""
        self.left -= SEEK_BYTES
        return self.file.seek(*where)


@contextlib.contextmanager
def _opened_video(path: str, name: str, limits: Limits) -> Iterator[tuple]:
    """Open a local file as (PyAV's container, its best video stream, the file); library errors become InputError."""
    try:
        # optional: pictures work without it
        import av
    except ImportError:
        raise InputError(f"{name} needs PyAV to be read as a video: pip install av (minivl's extra \"video\"); or give "
                         "its frames as a folder of pictures") from None
    # A Python file in place of a path, no protocols, and lists of containers and codecs: a crafted file cannot make
    # ffmpeg open another one, or use what few have tested. max_pixels stops a stream larger than its container says;
    # generous, as codecs round sizes up.
    most = min(2 * limits.picture_pixels, limits.decoding_bytes // DECODER_BYTES) + 2**20
    options = {"max_pixels": str(most)}
    rules = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none", "codec_whitelist": CODECS,
             "max_streams": str(MOST_STREAMS)}
    # Before PyAV 19, titles that are not UTF-8 are an error unless told otherwise; since then it cannot be told.
    texts = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    bugs = (TypeError, AttributeError, NameError)       # not what damaged files cause, but a change of PyAV
    with contextlib.ExitStack() as stack:
        with translated(name, "cannot be opened as a video: it is cut short, damaged, or not MP4, MOV, MKV, WebM, "
                               "AVI, MPEG, FLV, OGG or ASF; convert it to MP4", bugs):
            file = _Counted(stack.enter_context(open(path, "rb")))
            check_tables(file.file, name, TOTAL_FRAMES)
            container = stack.enter_context(av.open(file, mode="r", options=options, container_options=rules, **texts))
            stream = container.streams.best("video")
        if stream is None or stream.codec_context is None or stream.codec_context.name not in CODECS.split(","):
            raise InputError(f"{name} holds no video stream in a codec that is read here; save it again as H.264")
        with translated(name, "the video is cut short or damaged; save or download it again", bugs):
            stream.codec_context.options = options
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = min(os.cpu_count() or 1, 4)     # each holds frames
            width = stream.codec_context.width
            height = stream.codec_context.height
            if width and height:        # else unknown until the first frame is decoded, which is checked as well
                check_size(width, height, name, limits)
            yield container, stream, file   # what the caller demuxes and decodes is translated as well
