"""At which packets decoding may begin: what the bitstream says, where the container's key flag is not enough.

FFmpeg flags a packet as key when the container says so, and for H.264 also when the packet carries a recovery point:
with periodic intra refresh (OBS, NVENC, RTSP cameras, drones) that is a picture of the old scene, which becomes whole
only some pictures later. Decoding that begins there gives late, half-old or green pictures. So for H.264 a key packet
counts only if it holds an IDR picture, or a recovery point of 0 frames (the I pictures of open groups, exact from
there on); for HEVC only if it holds an IRAP picture. Other codecs' key pictures are whole by their definition.
"""

from collections.abc import Iterator

from av.packet import Packet
from av.video.stream import VideoStream

H264_IDR, H264_SEI = 5, 6  # ITU-T H.264, table 7-1
HEVC_IRAP = range(16, 24)  # ITU-T H.265, table 7-1: BLA, IDR, CRA and their reserved numbers
START_CODE = b"\0\0\1"  # ITU-T H.264, annex B
RECOVERY_POINT = 6  # payload type of the SEI message, ITU-T H.264, D.1.8


def is_entry_point(packet: "Packet[VideoStream]", stream: VideoStream) -> bool:
    """Whether every picture shown from this packet on is whole when decoding begins at it."""
    if not packet.is_keyframe:
        return False
    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata or b""
    match codec:
        case "h264":
            length_bytes = (extradata[4] & 3) + 1 if extradata[:1] == b"\x01" and len(extradata) > 4 else 0
            return any(_is_whole_h264(unit) for unit in _units(bytes(packet), length_bytes))
        case "hevc":
            length_bytes = (extradata[21] & 3) + 1 if extradata[:1] == b"\x01" and len(extradata) > 21 else 0
            return any(unit[0] >> 1 & 63 in HEVC_IRAP for unit in _units(bytes(packet), length_bytes))
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
