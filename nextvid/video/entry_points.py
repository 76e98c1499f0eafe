"""At which packets decoding may begin: what the bitstream says, where the container's key flag is not enough.

FFmpeg flags a packet as key when the container says so, and for H.264 also when the packet carries a recovery point:
with periodic intra refresh (OBS, NVENC, RTSP cameras, drones) that is a picture of the old scene, which becomes whole
only some pictures later. Decoding that begins there gives late, half-old or green pictures. So for H.264 a key packet
counts only if it holds an IDR picture, or a recovery point of 0 frames (the I pictures of open groups, exact from
there on); for HEVC only if it holds an IRAP picture. In MP4 and Matroska the flag is whatever the writer put there, so
that for the other codecs of video files, too, the picture itself says whether it is intra coded.
"""

from collections.abc import Iterator

from av.packet import Packet
from av.video.stream import VideoStream

H264_IDR, H264_SEI = 5, 6  # ITU-T H.264, table 7-1
HEVC_IRAP = range(16, 24)  # ITU-T H.265, table 7-1: BLA, IDR, CRA and their reserved numbers
START_CODE = b"\0\0\1"  # ITU-T H.264, annex B
RECOVERY_POINT = 6  # payload type of the SEI message, ITU-T H.264, D.1.8
MPEG_PICTURE, MPEG4_VOP = START_CODE + b"\0", START_CODE + b"\xb6"  # ISO 13818-2, table 6-1; ISO 14496-2, table 6-3
AV1_FRAME_HEADER, AV1_FRAME = 3, 6  # types of open bitstream units, AV1 specification 6.2.2


def is_entry_point(packet: "Packet[VideoStream]", stream: VideoStream) -> bool:
    """Whether every picture shown from this packet on is whole when decoding begins at it."""
    if not packet.is_keyframe:
        return False
    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata or b""
    data = bytes(packet)
    match codec:
        case "h264":
            length_bytes = (extradata[4] & 3) + 1 if extradata[:1] == b"\x01" and len(extradata) > 4 else 0
            return any(_is_whole_h264(unit) for unit in _units(data, length_bytes))
        case "hevc":
            length_bytes = (extradata[21] & 3) + 1 if extradata[:1] == b"\x01" and len(extradata) > 21 else 0
            return any(unit[0] >> 1 & 63 in HEVC_IRAP for unit in _units(data, length_bytes))
        case "mpeg1video" | "mpeg2video":  # picture_coding_type, after 10 bits of temporal_reference
            header = data.partition(MPEG_PICTURE)[2]
            return len(header) > 1 and header[1] >> 3 & 7 == 1
        case "mpeg4":  # vop_coding_type
            header = data.partition(MPEG4_VOP)[2]
            return len(header) > 0 and header[0] >> 6 == 0
        case "vp8":  # RFC 6386, 9.1
            return data[0] & 1 == 0
        case "vp9":  # show_existing_frame and frame_type, VP9 bitstream specification 6.2; profile 3 has a bit before
            return data[0] << (data[0] >> 4 & 3 == 3) & 0b1100 == 0
        case "av1":
            return _is_key_av1(data)
        case _:
            return True


def must_begin_at_entry(stream: VideoStream) -> bool:
    """Whether a file of this codec is read from its first entry point on, and what comes before it is left out."""
    return stream.codec_context.codec.canonical_name in {"h264", "hevc"}


def _units(data: bytes, length_bytes: int) -> Iterator[bytes]:
    """The NAL units of a packet: each behind its length (MP4, Matroska), or behind start codes where that is 0.

    Some phones put start codes inside of what has a length, which decoders follow.
    """
    if not length_bytes:
        yield from (unit.rstrip(b"\0") for unit in data.split(START_CODE)[1:] if unit.rstrip(b"\0"))
        return
    at = 0
    while at + length_bytes < len(data):
        size = int.from_bytes(data[at : at + length_bytes], "big")
        at += length_bytes + size
        yield from (unit for unit in data[at - size : at].split(START_CODE) if unit)


def _is_whole_h264(unit: bytes) -> bool:
    """Whether a unit is a slice of an IDR picture, or an SEI with a recovery point that needs no further pictures."""
    kind = unit[0] & 31
    if kind != H264_SEI:
        return kind == H264_IDR
    payload = unit[1:].replace(b"\0\0\3", b"\0\0")  # emulation prevention, 7.4.1.1
    at = 0
    while at + 2 < len(payload):
        numbers = []
        for _ in range(2):  # type, then size: each a run of 255s and a last byte
            number = 0
            while at < len(payload) and payload[at] == 255:
                number, at = number + 255, at + 1
            if at >= len(payload):
                return False
            numbers.append(number + payload[at])
            at += 1
        message, size = numbers
        if message == RECOVERY_POINT and at < len(payload):
            return bool(
                payload[at] & 128
            )  # recovery_frame_cnt, an Exp-Golomb code: its first bit is 1 for the number 0
        at += size
    return False


def _is_key_av1(data: bytes) -> bool:
    """Whether the first frame of a temporal unit is a key frame (AV1 specification 5.3 and 5.9.2)."""
    at = 0
    while at < len(data):
        header = data[at]
        at += 2 if header & 4 else 1  # with an extension byte
        size = shift = 0
        while header & 2 and at < len(data):  # leb128, where the unit has a size of its own
            size, shift, at = size | (data[at] & 127) << shift, shift + 7, at + 1
            if data[at - 1] < 128:
                break
        if header >> 3 & 15 in (AV1_FRAME_HEADER, AV1_FRAME):
            return at < len(data) and data[at] >> 5 == 0  # show_existing_frame, then two bits of frame_type
        at += size if header & 2 else len(data)
    return False
