"""Pictures and videos in, RGB PIL images out: everything that opens what a stranger may have sent.

    local     files of this machine         pictures   load_image: one picture from any source
    fetch     http(s):// and data: URLs     video      load_video: the chosen frames of a video
    parts     what decoding a picture costs tables     what the tables of an MP4 claim
"""
from minivl.media.pictures import load_image
from minivl.media.video import frame_indices, load_video
