"""At which packets decoding may begin, and which are missing: what the bitstream says, beside the container's flags.

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
H264_SLICES, H264_SPS = (1, 5), 7  # likewise
H264_HIGH_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})  # 7.3.2.1.1
HEADER_BYTES, HEVC_HEADER_BYTES = 24, 128  # hold what is read of a slice's or sequence's header
HEVC_IRAP = range(16, 24)  # ITU-T H.265, table 7-1: BLA, IDR, CRA and their reserved numbers
START_CODE = b"\0\0\1"  # ITU-T H.264, annex B
RECOVERY_POINT = 6  # payload type of the SEI message, ITU-T H.264, D.1.8
MPEG_PICTURE, MPEG4_VOP = START_CODE + b"\0", START_CODE + b"\xb6"  # ISO 13818-2, table 6-1; ISO 14496-2, table 6-3
# Codecs of which FFmpeg decodes what comes before, as smears on grey or black, or refuses the file; flags of the others
# (Theora in Ogg, intra-coded ones) are missing in sound files, or every picture is whole.
BEGIN_AT_ENTRY = frozenset({
    "h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9", "av1", "flv1", "wmv1", "wmv2", "wmv3", "vc1",
})  # fmt: skip
# Of these a lost picture leaves a trace: an error (HEVC), or a gap in the numbers (ReferencePictures).
TELL_OF_LOSS = frozenset({"h264", "hevc"})
AV1_SEQUENCE, AV1_FRAME_HEADER, AV1_FRAME = 1, 3, 6  # types of open bitstream units, AV1 specification 6.2.2
MPEG_SEQUENCE, HEVC_SPS = START_CODE + b"\xb3", 33  # ISO 13818-2, table 6-1; ITU-T H.265, table 7-1
MPEG4_LAYER = tuple(START_CODE + bytes([code]) for code in range(0x20, 0x30))  # ISO 14496-2, table 6-3


def is_entry_point(packet: "Packet[VideoStream]", stream: VideoStream) -> bool:
    """Whether every picture shown from this packet on is whole when decoding begins at it."""
    if not packet.is_keyframe:
        return False
    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata or b""
    data = bytes(packet)
    match codec:
        case "h264":
            return any(_is_whole_h264(unit) for unit in _units(data, _length_bytes(extradata, 4)))
        case "hevc":
            return any(unit[0] >> 1 & 63 in HEVC_IRAP for unit in _units(data, _length_bytes(extradata, 21)))
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
        case "av1":  # show_existing_frame, then two bits of frame_type (AV1 specification 5.3 and 5.9.2)
            frames = (start for kind, start, _ in _av1_units(data) if kind in (AV1_FRAME_HEADER, AV1_FRAME))
            first = next(frames, len(data))
            return first < len(data) and data[first] >> 5 == 0
        case _:
            return True


def must_begin_at_entry(stream: VideoStream) -> bool:
    """Whether a file of this codec is read from its first entry point on, and what comes before it is left out."""
    return stream.codec_context.codec.canonical_name in BEGIN_AT_ENTRY


def size_header(packet: "Packet[VideoStream]", stream: VideoStream) -> bytes:
    """What an entry point says of the size of its pictures, with little else; empty where it says nothing.

    Of H.264 `ReferencePictures.sizes` tells it.
    """
    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata or b""
    data = bytes(packet)
    match codec:
        case "hevc":
            sets = [u for u in _units(data, _length_bytes(extradata, 21)) if u[0] >> 1 & 63 == HEVC_SPS]
            return b"".join(_size_of_hevc(unit) for unit in sets)
        case "mpeg1video" | "mpeg2video":  # 12 bits each of width and height
            return data.partition(MPEG_SEQUENCE)[2][:3]
        case "mpeg4":  # the header of the video object layer
            found = min((at for code in MPEG4_LAYER if (at := data.find(code)) >= 0), default=None)
            return b"" if found is None else data[found + 4 :].partition(START_CODE)[0]
        case "vp8":  # RFC 6386, 9.1
            return data[6:10]
        case "vp9":  # 6.2: 32 bits of size behind those of colours, of which each profile has its own number
            profile = (data[0] >> 5 & 1) + 2 * (data[0] >> 4 & 1)
            more = (profile >= 2) + 3 * (profile % 2)
            return (int.from_bytes(data[4:9], "big") >> 4 - more & 0xFFFFFFFF).to_bytes(4, "big")
        case "av1":
            return b"".join(data[start:end] for kind, start, end in _av1_units(data) if kind == AV1_SEQUENCE)
        case _:
            return b""


class ReferencePictures:
    """Whether an H.264 stream has every picture that others refer to: they are numbered (ITU-T H.264, 7.4.3).

    FFmpeg conceals a lost one without an error: the pictures behind it are smeared up to the next entry point.
    """

    def __init__(self, stream: VideoStream) -> None:
        extradata = stream.codec_context.extradata or b""
        self.length_bytes = _length_bytes(extradata, 4)
        self.before: int | None = None  # number of the reference picture before
        self.number_bits = 0  # unknown
        self.sizes: set[tuple[int, ...]] = set()  # different ones in its parameter sets, in macroblocks
        at = 8  # of the first set, behind its size (ISO/IEC 14496-15, 5.3.3.1)
        for unit in [extradata[at:]] if self.length_bytes else _units(extradata, 0):
            self._read_parameters(unit)

    def judge(self, packet: "Packet[VideoStream]") -> tuple[bool, bool]:
        """Whether a packet is an entry point, and whether a reference picture is missing between it and the one before.

        Each packet is to be judged once, in order.
        """
        units = list(_units(bytes(packet), self.length_bytes))
        begins = packet.is_keyframe and any(map(_is_whole_h264, units))
        return begins, self._is_lost_before(units) and not begins

    def _is_lost_before(self, units: list[bytes]) -> bool:
        for unit in units:
            self._read_parameters(unit)
            if unit[0] & 31 in H264_SLICES and self.number_bits:
                bits = _Bits(unit[1:])
                for _ in range(3):  # first_mb_in_slice, slice_type, pic_parameter_set_id
                    bits.golomb()
                number, before = bits.take(self.number_bits), self.before
                if unit[0] >> 5 & 3:  # nal_ref_idc
                    self.before = number
                return before is not None and number not in (before, (before + 1) % (1 << self.number_bits))
        return False

    def _read_parameters(self, unit: bytes) -> None:
        """The width of numbers in a sequence parameter set (7.3.2.1.1); 0, unknown, for sets that are seldom."""
        if len(unit) < 5 or unit[0] & 31 != H264_SPS:
            return
        bits, self.number_bits = _Bits(unit[4:]), 0
        bits.golomb()  # seq_parameter_set_id
        if unit[1] in H264_HIGH_PROFILES:
            if bits.golomb() == 3:  # 4:4:4: planes may be pictures of their own
                return
            bits.golomb(), bits.golomb(), bits.take(1)  # bit depths, qpprime_y_zero_transform_bypass_flag
            if bits.take(1):  # scaling lists
                return
        number_bits = bits.golomb() + 4
        match bits.golomb():  # pic_order_cnt_type
            case 0:
                bits.golomb()
            case 1:
                return
        bits.golomb()  # max_num_ref_frames
        self.number_bits = 0 if bits.take(1) else number_bits  # gaps_in_frame_num_value_allowed_flag
        # pic_width_in_mbs_minus1, pic_height_in_map_units_minus1, frame_mbs_only_flag
        self.sizes.add((bits.golomb(), bits.golomb(), bits.take(1)))


def _size_of_hevc(unit: bytes) -> bytes:
    """Width and height in a sequence parameter set (ITU-T H.265, 7.3.2.2.1)."""
    bits = _Bits(unit[2:], HEVC_HEADER_BYTES)
    bits.take(4)  # sps_video_parameter_set_id
    layers = bits.take(3)  # sps_max_sub_layers_minus1
    bits.take(1), bits.take(96)  # sps_temporal_id_nesting_flag; profile and level, 7.3.3
    present = [(bits.take(1), bits.take(1)) for _ in range(layers)]
    for _ in range(layers, 8 if layers else 0):
        bits.take(2)
    for profile, level in present:
        bits.take(88 * profile + 8 * level)
    bits.golomb()  # sps_seq_parameter_set_id
    if bits.golomb() == 3:  # chroma_format_idc
        bits.take(1)
    return b"".join(bits.golomb().to_bytes(4, "big") for _ in range(2))


class _Bits:
    """The first bits of a unit's payload, without emulation prevention (7.4.1.1); zeros behind its end."""

    def __init__(self, payload: bytes, size_bytes: int = HEADER_BYTES) -> None:
        self._bits = "".join(f"{byte:08b}" for byte in payload[:size_bytes].replace(b"\0\0\3", b"\0\0"))
        self._at = 0

    def take(self, count: int) -> int:
        """An unsigned number of `count` bits."""
        self._at += count
        return int(self._bits[self._at - count : self._at].ljust(count, "0") or "0", 2)

    def golomb(self) -> int:
        """An unsigned Exp-Golomb code (9.1)."""
        zeros = max(0, self._bits.find("1", self._at) - self._at)
        self._at += zeros
        return self.take(zeros + 1) - 1


def _length_bytes(extradata: bytes, at: int) -> int:
    """Bytes of a unit's length, which byte `at` of the decoder's configuration says; 0 where start codes part units."""
    return (extradata[at] & 3) + 1 if extradata[:1] == b"\x01" and len(extradata) > at else 0


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


def _av1_units(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Type, start and end of each open bitstream unit's payload."""
    at = 0
    while at < len(data):
        header = data[at]
        at += 2 if header & 4 else 1  # with an extension byte
        size = shift = 0
        while header & 2 and at < len(data):  # leb128, where the unit has a size of its own
            size, shift, at = size | (data[at] & 127) << shift, shift + 7, at + 1
            if data[at - 1] < 128:
                break
        end = at + size if header & 2 else len(data)
        yield header >> 3 & 15, at, end
        at = end
