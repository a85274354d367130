"""frame_indices and load_video: which frames are chosen, and that those of files, animations and folders are exact."""
import random
import struct
import sys

import pytest
from fuzz import videos as fuzzed
from media_files import encoded, mutated, noise, refused
from PIL import Image

from minivl import load_video
from minivl.limits import InputError, Limits
from minivl.media import frame_indices, video

# ---- frame_indices -----------------------------------------------------------------------------------------------

def test_frame_indices_golden():
    assert frame_indices(299, 30, 8) == [18, 55, 93, 130, 168, 205, 242, 280]
    assert frame_indices(1000, 25, 6, (2, 5)) == [56, 68, 81, 94, 106, 118]
    assert frame_indices(5, 24, 8) == [0, 1, 1, 2, 2, 3, 4, 4]
    assert frame_indices(0, None, 3) == [0, 0, 0]
    assert frame_indices(299, None, 8) == frame_indices(299, 30, 8)


def test_frame_indices_round_half_to_even():
    # parts of 2.5 frames: 1.25 + round(0, 2.5 -> 2, 5, 7.5 -> 8); half up would give 4 for the second
    assert frame_indices(10, None, 4) == [1, 3, 6, 9]
    # start 0.5 * 5 = 2.5 -> 2, end 1.5 * 5 = 7.5 -> 8
    assert frame_indices(100, 5, 3, (0.5, 1.5)) == [3, 5, 7]


def test_frame_indices_bounds():
    assert frame_indices(299, 30, 2, (-5, 2)) == [15, 45]           # clamped to 0..60
    assert frame_indices(299, 30, 2, [9, 100]) == [277, 291]        # clamped to 270..299, part 14.5: 277.25 and + 14
    assert frame_indices(299, 30, 3, (1, 1)) == [30, 30, 30]
    assert frame_indices(2_000_000, 10, 1) == [500_000]             # the reference stops at 100000 seconds
    for bound in ((20, 30), (-5, -1), (10.1, 11)):
        with refused(f"bound {bound[0]:g}..{bound[1]:g} seconds lies outside the video", "300 frames", "10 seconds"):
            frame_indices(299, 30, 2, bound)


def test_frame_indices_stay_inside():
    rng = random.Random(3)
    for _ in range(2000):
        last, count = rng.randrange(200), rng.randrange(1, 40)
        found = frame_indices(last, rng.choice((None, 0.5, 29.97)), count)
        assert len(found) == count and found == sorted(found) and 0 <= found[0] <= found[-1] <= last


@pytest.mark.parametrize("arguments, words", [
    ((299, 30, 0), ["num_segments", "0"]), ((299, 30, -3), ["-3"]), ((299, 30, 2.5), ["2.5"]),
    ((299, 30, True), ["True"]),
    ((299, 30, 513), ["513", "512", "video_frames"]), ((-1, 30, 8), ["max_frame", "-1"]), ((1.5, 30, 8), ["max_frame"]),
    ((299, float("nan"), 8), ["fps must be a finite number"]), ((299, "30", 8), ["fps must be a finite number"]),
    ((299, 0, 8), ["fps must be above 0"]), ((299, -1, 8), ["fps must be above 0"]), ((299, 1e7, 8), ["1e+07"]),
    ((299, 30, 8, (float("nan"), 2)), ["start of bound", "nan"]), ((299, 30, 8, (0, float("inf"))), ["end of bound"]),
    ((299, 30, 8, (0, 10**400)), ["end of bound"]), ((299, 30, 8, (0, 1e300)), ["1e9"]),
    ((299, 30, 8, (5, 2)), ["5..2", "end before it starts"]), ((299, 30, 8, (5,)), ["(start, end)"]),
    ((299, 30, 8, 5), ["(start, end)"]), ((299, 30, 8, "ab"), ["(start, end)"]), ((299, 30, 8, ("a", "b")), ["bound"]),
    ((299, None, 8, (0, 1)), ["bound is in seconds", "pass fps"])])
def test_frame_indices_bad_input(arguments, words):
    with refused(*words):
        frame_indices(*arguments)


def test_frame_indices_limit_can_be_raised():
    assert len(frame_indices(299, 30, 513, limits=Limits(video_frames=513))) == 513


# ---- load_video: pictures ----------------------------------------------------------------------------------------

def grey_frames(count, size=(16, 16), step=10):
    return [Image.new("RGB", size, (step * index,) * 3) for index in range(count)]


def every(count):
    """Frame numbers that `num_segments=100` takes of a video of `count` frames: all of them, some several times."""
    indices = frame_indices(count - 1, None, 100)
    assert set(indices) == set(range(count))
    return indices


def levels(frames):
    """Grey level / 10 of each frame: its number, for frames made by `grey_frames`."""
    assert all(type(frame) is Image.Image and frame.mode == "RGB" for frame in frames)
    return [round(frame.getpixel((frame.width // 2, frame.height // 2))[1] / 10) for frame in frames]


def test_folder_in_natural_order(tmp_path):
    for index, frame in enumerate(grey_frames(12)):
        frame.save(tmp_path / f"Frame{index}.PNG" if index % 2 else tmp_path / f"frame{index}.png")
    (tmp_path / ".hidden.txt").write_text("ignored")
    assert levels(load_video(tmp_path, num_segments=100)) == every(12)
    assert levels(load_video(str(tmp_path), num_segments=4)) == [1, 4, 7, 9] == frame_indices(11, None, 4)
    assert levels(load_video(tmp_path.as_uri(), num_segments=2, bound=(1, 2), fps=5)) == [6, 8]
    with refused("bound is in seconds", "pass fps"):
        load_video(tmp_path, bound=(1, 2))
    with refused("local paths are not accepted"):
        load_video(tmp_path, allow_paths=False)
    (tmp_path / "frame3.txt").write_text("stray")
    with refused("'frame3.txt'", "not a picture"):
        load_video(tmp_path)


def test_folder_problems(tmp_path):
    (tmp_path / ".hidden.png").write_bytes(b"x")
    with refused("is an empty folder"):
        load_video(tmp_path)
    (tmp_path / "1.png").write_bytes(encoded(noise()))
    (tmp_path / "2.png").write_bytes(encoded(noise())[:300])
    with refused("2.png", "cut short"):
        load_video(tmp_path, num_segments=4)
    assert load_video(tmp_path, num_segments=1)[0].size == (48, 32)     # only what is chosen is opened
    with refused("1.png", "1536 pixels", "100"):
        load_video(tmp_path, num_segments=1, limits=Limits(picture_pixels=100))


def test_list_of_frames(tmp_path):
    frames = grey_frames(10)
    frames[3].save(tmp_path / "x.png")
    mixed = [*frames[:3], tmp_path / "x.png", encoded(frames[4]), *frames[5:]]
    assert levels(load_video(mixed, num_segments=100)) == every(10)
    assert levels(load_video(tuple(mixed), num_segments=4)) == [1, 3, 5, 8] == frame_indices(9, None, 4)
    assert levels(load_video(frames, num_segments=2, bound=(1, 2), fps=3)) == [3, 5]
    assert levels(load_video(frames[:1], num_segments=3)) == [0, 0, 0]
    with refused("the list of frames holds no frames"):
        load_video([])
    with refused("local paths are not accepted"):
        load_video(mixed, num_segments=100, allow_paths=False)
    with refused("URLs are not accepted"):
        load_video(["http://127.0.0.1/x.png"], num_segments=1)
    with refused("a picture cannot be a int"):
        load_video([1, 2])


def test_total_frames_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(video, "TOTAL_FRAMES", 9)
    (tmp_path / "x.gif").write_bytes(animation("GIF", {}, count=10))
    for source in (grey_frames(10), tmp_path / "x.gif"):
        with refused("has 10 frames", "the limit is 9"):
            load_video(source)


def test_memory_of_all_frames_is_bounded(tmp_path):
    frames, limits = grey_frames(20), Limits(decoding_bytes=16 * 256 * 4)      # 16 frames of 256 pixels
    assert len(load_video(frames, num_segments=16, limits=limits)) == 16
    assert len(load_video(frames[:16], num_segments=100, limits=limits)) == 100     # repeated frames cost nothing
    with refused("first 17 frames", "17408 bytes", "16384", "decoding_bytes"):
        load_video(frames, num_segments=100, limits=limits)


ANIMATIONS = [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})]


def animation(format, options, count=12, duration=100):
    """The left half changes, the right half stays: writers then store only the part that changed."""
    frames = [Image.new("RGB", (32, 16), (200, 30, 60)) for _ in range(count)]
    for index, frame in enumerate(frames):
        frame.paste((index * 10,) * 3, (0, 0, 20, 16))
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=duration, **options)


@pytest.mark.parametrize("format, options", ANIMATIONS)
def test_animation(tmp_path, format, options):
    path = tmp_path / "animation.bin"           # recognized by content, not by name
    path.write_bytes(animation(format, options))
    frames = load_video(path, num_segments=100)
    assert levels(frames) == every(12)
    assert {frame.getpixel((30, 8)) for frame in frames} == {(200, 30, 60)}       # composed with what was there
    assert levels(load_video(path, num_segments=4)) == [1, 4, 7, 9]
    # 100 ms a frame = 10 frames per second: 0.5..1 s is frames 5..10
    assert levels(load_video(path, num_segments=2, bound=(0.5, 1))) == [6, 8] == frame_indices(11, 10, 2, (0.5, 1))
    assert levels(load_video(path, num_segments=2, bound=(0.5, 1), fps=4)) == [2, 3] == frame_indices(11, 4, 2, (.5, 1))
    with refused("lies outside the video", "1.2 seconds"):
        load_video(path, bound=(5, 6))


@pytest.mark.parametrize("format, options", ANIMATIONS)
def test_animation_mean_duration(tmp_path, format, options):
    path = tmp_path / "x.gif"
    path.write_bytes(animation(format, options, count=4, duration=[50, 350, 200, 200]))
    # mean 200 ms = 5 frames per second: 0.4..0.6 s is frames 2..3
    assert levels(load_video(path, num_segments=1, bound=(0.4, 0.6))) == [2]
    path.write_bytes(animation(format, options, count=4, duration=5000))        # a slide show: 0.2 frames per second
    assert levels(load_video(path, num_segments=1, bound=(10, 15))) == [2]


@pytest.mark.parametrize("format, options", ANIMATIONS)
def test_animation_cut_short(tmp_path, format, options):
    path, data = tmp_path / "x.gif", encoded(noise(seed=0), format, save_all=True, duration=100,
                                             append_images=[noise(seed=seed) for seed in range(1, 6)], **options)
    for share in (0.02, 0.3, 0.9):
        path.write_bytes(data[:int(len(data) * share)])
        with refused("x.gif", "cut short"):
            load_video(path, num_segments=6, bound=(0, 0.5), limits=Limits())


def test_animation_without_durations(tmp_path):
    path = tmp_path / "x.gif"
    path.write_bytes(animation("GIF", {}, duration=0))
    assert levels(load_video(path, num_segments=100)) == every(12)
    with refused("x.gif", "how long its frames are shown", "pass fps"):
        load_video(path, bound=(0, 1))
    assert len(load_video(path, bound=(0, 1), fps=10)) == 8


def test_animated_png_with_a_still_in_front(tmp_path):
    path, frames = tmp_path / "x.png", grey_frames(4)
    path.write_bytes(encoded(Image.new("RGB", (16, 16), "white"), "PNG", save_all=True, append_images=frames,
                             duration=100, default_image=True))
    with Image.open(path) as image:
        assert image.n_frames == 5
    assert levels(load_video(path, num_segments=100)) == every(4)
    assert levels(load_video(path, num_segments=2, bound=(0.1, 0.3))) == [1, 2] == frame_indices(3, 10, 2, (0.1, 0.3))


def test_still_pictures_are_videos_of_one_frame(tmp_path):
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    for format in ("JPEG", "PNG", "BMP", "GIF", "WEBP"):
        (tmp_path / "x").write_bytes(encoded(red, format))
        assert len(load_video(tmp_path / "x", num_segments=3)) == 3
    for format in ("TIFF", "MPO"):                      # further pages and previews are not frames
        (tmp_path / "x").write_bytes(encoded(red, format, save_all=True, append_images=[blue]))
        assert all(frame.getpixel((4, 4))[0] > 250 for frame in load_video(tmp_path / "x", num_segments=100))


def test_animation_that_grows(tmp_path):
    """The second frame of this GIF is larger than the canvas its header announces; Pillow grows the canvas."""
    small, large = (encoded(noise(size, size).quantize(256), "GIF") for size in (8, 64))
    (tmp_path / "x.gif").write_bytes(small[:-1] + large[13 + 3 * 256:])
    assert load_video(tmp_path / "x.gif", num_segments=1, limits=Limits(picture_pixels=64))[0].size == (8, 8)
    if load_video(tmp_path / "x.gif", num_segments=100)[-1].size == (8, 8):
        pytest.skip("this Pillow (10.0) crops to the canvas")
    with refused("frame 1", "64x64 = 4096 pixels", "4095"):
        load_video(tmp_path / "x.gif", num_segments=100, limits=Limits(picture_pixels=4095))


def test_animation_limits(tmp_path):
    path = tmp_path / "x.gif"
    path.write_bytes(animation("GIF", {}))
    size = path.stat().st_size
    for field in ("video_bytes", "picture_bytes"):
        with refused(f"has {size} bytes, the limit is {size - 1}", field):
            load_video(path, limits=Limits(**{field: size - 1}))
    with refused("32x16 = 512 pixels", "511"):
        load_video(path, limits=Limits(picture_pixels=511))
    with refused("is 32x16, an aspect ratio of 2", "1.5"):
        load_video(path, limits=Limits(aspect_ratio=1.5))
    with refused("num_segments is 8", "the limit is 7"):
        load_video(path, limits=Limits(video_frames=7))
    path.write_text("not a gif")
    with refused("x.gif", "not a picture"):
        load_video(path)
    path.write_bytes(b"")
    with refused("empty (0 bytes)"):
        load_video(path)


def test_load_video_bad_sources(tmp_path):
    for wrong in (None, 3, b"bytes", noise()):
        with refused("a video cannot be a " + type(wrong).__name__):
            load_video(wrong)
    for url in ("http://host/x.mp4", "HTTPS://host/x.mp4", "data:video/mp4;base64,AAAA"):
        with refused("local files only", "download"):
            load_video(url)
    with refused("'no/such.mp4'", "no such file"):
        load_video("no/such.mp4")
    with refused("local paths are not accepted"):
        load_video("no/such.mp4", allow_paths=False)
    with refused("num_segments"):       # before looking for the file
        load_video("no/such.mp4", num_segments=0)
    with refused("end before it starts"):
        load_video("no/such.mp4", bound=(3, 1))


# ---- load_video: containers --------------------------------------------------------------------------------------

def write_video(path, frames, codec="mpeg4", container=None, title="", patch=lambda data: data):
    """Ten frames per second; `patch` may change the bytes of each packet."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=container or {}) as output:
        output.metadata["title"] = title
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for frame in [*map(av.VideoFrame.from_image, frames), None]:
            for packet in stream.encode(frame):
                patched = av.Packet(patch(bytes(packet)))
                patched.stream, patched.time_base, patched.is_keyframe = stream, packet.time_base, packet.is_keyframe
                patched.pts, patched.dts, patched.duration = packet.pts, packet.dts, packet.duration
                output.mux(patched)
    return path


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    path = tmp_path / "x.mp4"
    path.write_bytes(b"\0\0\0\x20ftypisom" + b"\0" * 100)
    with refused("x.mp4", 'pip install av (minivl\'s extra "video")'):
        load_video(path)


@pytest.mark.parametrize("name, codec", [("x.mp4", "mpeg4"), ("x.mp4", "libx264"), ("x.mov", "libx264"),
                                         ("x.mkv", "libx264"), ("x.webm", "libvpx"), ("x.avi", "mpeg4"),
                                         ("x.ts", "libx264")])
def test_video_frames_are_exact(tmp_path, name, codec):
    """libx264 stores frames out of order (B frames); MKV, WebM and TS do not say how many there are."""
    path = write_video(tmp_path / name, grey_frames(20, (64, 48)), codec)
    frames = load_video(path, num_segments=100)
    assert levels(frames) == every(20) and frames[0].size == (64, 48)
    assert levels(load_video(path)) == [1, 3, 6, 8, 11, 13, 15, 18] == frame_indices(19, 10, 8)
    assert levels(load_video(path, num_segments=3, bound=(0.5, 1.1))) == [6, 8, 10]
    assert levels(load_video(path, num_segments=2, bound=(0.5, 1.1), fps=5)) == frame_indices(19, 5, 2, (.5, 1.1))
    with refused("lies outside the video", "2 seconds at 10 frames"):
        load_video(path, bound=(7, 8))
    path.rename(tmp_path / "no_suffix")
    assert levels(load_video(tmp_path / "no_suffix", num_segments=1)) == [9] == frame_indices(19, 10, 1)


def test_more_packets_than_frames(tmp_path):
    """VP8 frames can say "do not show me": then there are fewer frames than packets, and decoding must count them."""
    order = iter(range(20))

    def hide_every_fourth(data):
        return bytes([data[0] & ~16]) + data[1:] if next(order) % 4 == 3 else data
    path = write_video(tmp_path / "x.webm", grey_frames(20, (64, 48)), "libvpx", patch=hide_every_fourth)
    shown = [index for index in range(20) if index % 4 != 3]
    assert levels(load_video(path, num_segments=5)) == [shown[index] for index in frame_indices(14, 10, 5)]
    assert levels(load_video(path, num_segments=1, bound=(1.4, 1.4))) == [18]


@pytest.mark.parametrize("size", [1, 0.5, -0.001])
@pytest.mark.parametrize("a, b, c, d", [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
                                        (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0)])
def test_video_is_shown_as_its_matrix_says(tmp_path, a, b, c, d, size):
    """An MP4 says in its track header how to turn and mirror it: x' = a x + c y, y' = b x + d y.

    Checked by that formula. `size` is that of the matrix; the last: what is left of a sine instead of the zeros.
    """
    frame = Image.new("RGB", (64, 32))
    frame.paste((255, 0, 0), (0, 0, 32, 16))
    frame.paste((0, 255, 0), (32, 0, 64, 16))
    frame.paste((0, 0, 255), (0, 16, 32, 32))
    rest = size if size < 0 else 0
    scale = abs(size) if size > 0 else 1
    data = with_matrix(write_video(tmp_path / "x.mp4", [frame] * 3), (a * scale or rest, b * scale or rest, 0,
                                                                      c * scale or -rest, d * scale or -rest, 0))
    image = load_video(data, num_segments=1)[0]
    assert image.size == ((64, 32) if b == 0 else (32, 64))
    for x, y in ((8, 8), (50, 8), (8, 28), (50, 28)):
        left, up = x - 31.5, y - 15.5           # from the middle, which stays
        at = (a * left + c * up + (image.width - 1) / 2, b * left + d * up + (image.height - 1) / 2)
        assert [value > 128 for value in image.getpixel(at)] == [value > 128 for value in frame.getpixel((x, y))]


def test_video_at_an_angle_between_the_axes_stays(tmp_path):
    """As in the reference's reader: a frame turned by 45 degrees would have corners that nobody filmed."""
    frame = Image.new("RGB", (64, 32))
    frame.paste("white", (0, 0, 32, 16))
    path = with_matrix(write_video(tmp_path / "x.mp4", [frame] * 3), (0.7, 0.7, 0, -0.7, 0.7, 0))
    image = load_video(path, num_segments=1)[0]
    assert image.size == (64, 32) and image.getpixel((5, 5))[0] > 128 > image.getpixel((60, 28))[0]


def with_matrix(path, matrix):
    """Put a display matrix into an MP4 that was written without one."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    assert struct.unpack(">9i", data[place:place + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    data[place:place + 24] = struct.pack(">6i", *(round(65536 * value) for value in matrix))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("space, full", [("ITU709", False), ("ITU601", False), ("ITU709", True), ("ITU601", True)])
def test_video_colours_follow_the_tag(tmp_path, space, full):
    """Luma and chroma come back as the colours they were made from, by the matrix and range that the stream states."""
    av = pytest.importorskip("av")
    from av.video.reformatter import ColorRange, Colorspace
    path = str(tmp_path / "x.mp4")
    with av.open(path, "w") as output:
        stream = output.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.colorspace = 1 if space == "ITU709" else 6
        stream.codec_context.color_range = 2 if full else 1
        frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (200, 30, 40))).reformat(
            format="yuv420p", dst_colorspace=Colorspace[space],
            dst_color_range=ColorRange.JPEG if full else ColorRange.MPEG)
        for packet in [*stream.encode(frame), *stream.encode()]:
            output.mux(packet)
    found = load_video(path, num_segments=1)[0].getpixel((32, 32))
    assert all(abs(value - want) <= 4 for value, want in zip(found, (200, 30, 40))), found


def test_video_limits(tmp_path, monkeypatch):
    path = write_video(tmp_path / "x.mp4", grey_frames(20, (64, 32)))
    size = path.stat().st_size
    with refused(f"has {size} bytes, the limit is {size - 1}", "video_bytes"):
        load_video(path, limits=Limits(video_bytes=size - 1))
    assert len(load_video(path, limits=Limits(video_bytes=size, picture_pixels=2048))) == 8
    with refused("x.mp4' is 64x32 = 2048 pixels", "2047"):
        load_video(path, limits=Limits(picture_pixels=2047))
    with refused("an aspect ratio of 2", "1.5"):
        load_video(path, limits=Limits(aspect_ratio=1.5))
    with refused("20 frames of", "241664 bytes of memory", "decoding_bytes"):
        load_video(path, num_segments=100, limits=Limits(decoding_bytes=2048 * (38 + 20 * 4) - 1))
    assert len(load_video(path, num_segments=100, limits=Limits(decoding_bytes=2048 * (38 + 20 * 4)))) == 100
    with refused("more work than decoding 20000 pixels", "video_work"):
        load_video(path, num_segments=100, limits=Limits(video_work=20_000))
    monkeypatch.setattr(video, "TOTAL_FRAMES", 19)
    with refused("20 samples", "19"):
        load_video(path)


def test_video_that_changes_size(tmp_path):
    """The container and the first frames are small; every later frame is checked as well."""
    order = iter(range(6))
    large = encoded(noise(320, 240), "JPEG")
    path = write_video(tmp_path / "x.mkv", [noise(64, 48)] * 6, "mjpeg",
                       patch=lambda data: large if next(order) == 4 else data)
    sizes = [frame.size for frame in load_video(path, num_segments=100)]
    assert sizes == [(320, 240) if index == 4 else (64, 48) for index in every(6)]
    with refused("a frame of", "320x240 = 76800 pixels", "70000"):
        load_video(path, num_segments=100, limits=Limits(picture_pixels=70_000))


def test_video_title_that_is_not_utf8(tmp_path):
    path = write_video(tmp_path / "x.mkv", grey_frames(5, (64, 48)), title="\u00e9\u00e9")
    data = path.read_bytes()
    assert data.count(b"\xc3\xa9\xc3\xa9") == 1
    path.write_bytes(data.replace(b"\xc3\xa9\xc3\xa9", b"\xe9\xe9\xe9\xe9"))
    assert levels(load_video(path, num_segments=100)) == every(5)


def test_video_damaged(tmp_path):
    path = write_video(tmp_path / "x.mp4", [noise(64, 48, seed) for seed in range(20)], "libx264",
                       container={"movflags": "faststart"})
    data = path.read_bytes()
    assert len(load_video(path)) == 8
    import av
    for share in (0.95, 0.6):
        path.write_bytes(data[:int(len(data) * share)])
        words = [f"{int(len(data) * share)} of {len(data)} bytes"] if hasattr(av.stream.Stream, "index_entries") else []
        with refused("x.mp4", "cut short", *words):
            load_video(path)
    for share in (0.01, 0.05):
        path.write_bytes(data[:int(len(data) * share)])
        with refused("x.mp4"):
            load_video(path)
    path.write_bytes(data[:len(data) // 2] + b"\xff" * (len(data) // 2))
    with refused("x.mp4"):
        load_video(path)
    path.write_bytes(b"only words, many of them" * 100)
    with refused("x.mp4", "cannot be opened as a video", "MP4"):
        load_video(path)


def test_video_with_one_damaged_frame(tmp_path):
    order = iter(range(10))
    path = write_video(tmp_path / "x.mkv", [noise(64, 48, seed) for seed in range(10)],
                       patch=lambda data: data[:len(data) // 2] if next(order) == 5 else data)
    with refused("frame 5 of", "is damaged"):
        load_video(path, num_segments=100)
    assert len(load_video(path, num_segments=100, bound=(0, 0.4))) == 100       # frames 0 to 4 only


def test_video_without_a_video_stream(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=8000, layout="mono")
        for index in range(4):
            frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            frame.sample_rate, frame.pts = 8000, index * 1024
            frame.planes[0].update(bytes(frame.planes[0].buffer_size))
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with refused("sound.mp4", "no video stream"):
        load_video(path)


def test_playlists_cannot_open_other_files(tmp_path):
    av = pytest.importorskip("av")
    segment = write_video(tmp_path / "segment.ts", grey_frames(10, (64, 48)), "libx264")
    playlist = (f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{segment.as_uri()}\n#EXT-X-ENDLIST\n",
                "ffconcat version 1.0\nfile segment.ts\n")
    for text in playlist:
        path = tmp_path / "evil.mp4"
        path.write_text(text)
        with refused("evil.mp4", "cannot be opened as a video"):
            load_video(path)
    path.write_bytes(b"YUV4MPEG2 W2 H2 F10:1 C420jpeg\nFRAME\n" + b"\x80" * 6)        # harmless, but not listed
    with refused("evil.mp4", "cannot be opened as a video"):
        load_video(path)
    # The danger is real: without the rules of video.py, ffmpeg follows the playlist.
    path.write_text(playlist[0])
    path.rename(tmp_path / "evil.m3u8")
    with open(tmp_path / "evil.m3u8", "rb") as file, av.open(file, mode="r") as container:
        assert sum(1 for _ in container.decode(video=0)) == 10


@pytest.mark.filterwarnings("ignore")
def test_video_fuzz(tmp_path):
    rng, outcomes = random.Random(11), {"taken": 0, "refused": 0}
    frames = [noise(32, 32, seed) for seed in range(6)]
    seeds = [write_video(tmp_path / f"x.{kind}", frames, codec).read_bytes() for kind, codec in (
        ("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx"))]
    for _ in range(120):
        (tmp_path / "fuzz.mp4").write_bytes(mutated(rng.choice(seeds), rng))
        try:
            load_video(tmp_path / "fuzz.mp4", num_segments=3, bound=rng.choice((None, (0, 0.3))),
                       limits=Limits(picture_pixels=10**6))
            outcomes["taken"] += 1
        except InputError as error:
            assert " at 0x" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10, outcomes


@pytest.mark.parametrize("first", [b"ftyp", b"\xff\xff\xffp", b"free"])
def test_tables_that_claim_much_are_refused_whatever_the_file_begins_with(tmp_path, first):
    """ffmpeg looks for the boxes of an MP4 further on too: these 12 kB would become 2 GB of tables."""
    edit = fuzzed.box("edts", fuzzed.box("elst", fuzzed.numbers(1000), struct.pack(">IiI", 10**6, 0, 65536) * 1000))
    data = fuzzed.mp4(**fuzzed.plain_tables(900_000), edits=edit)
    path = tmp_path / "edits.mp4"
    path.write_bytes(data[:4] + first + data[8:])
    with refused("claims 900000000 samples times edits", "4000000"):
        load_video(path, num_segments=2)
