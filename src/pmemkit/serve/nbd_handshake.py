"""The NBD handshake: from a fresh connection to a chosen export and agreed features.

Fixed newstyle. One option at a time: read it, answer it, until the client chooses an export, gives
up or breaks the rules. Everything that was agreed is one value, so that starting TLS later can
throw it away at once.

Invariants:
1. Whatever a client sends ends in an answer, a closed connection or a :class:`Negotiated`; no
   assertion depends on it.
2. Memory held for one client is at most one option and one answer; work is bounded by the number of
   options a session may have. Time is the caller's business.
3. No channel of an export is opened here.

What this does not do: limit time, log, TLS (``STARTTLS`` is answered with ``ERR_UNSUP``, as the
mode without TLS has it).
"""

from dataclasses import dataclass

from pmemkit.errors import InvalidArgument, ProtocolError
from pmemkit.serve import nbd_protocol as nbd
from pmemkit.serve.channel import Channel, EndOfStream
from pmemkit.serve.export import Export, Exports
from pmemkit.serve.nbd_protocol import ErrorReply, InfoType, Option, OptionHeader, Reply

__all__ = ["Negotiated", "negotiate"]

_SHOWN_NAME_SIZE = 64


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What a client and the server agreed on. ``leftover``: the first bytes of transmission."""

    export: Export
    flags: nbd.TransmissionFlag
    structured: bool
    allocation_context: int | None
    leftover: bytes


@dataclass(slots=True)
class _Agreed:
    """What earlier options settled."""

    structured: bool = False
    allocation_export: Export | None = None
    """The export that ``base:allocation`` was selected for; for any other it does not count."""


async def negotiate(channel: Channel, exports: Exports) -> Negotiated | None:
    """Carries out one handshake; ``None`` when the client gave up in an orderly way.

    Raises :class:`~pmemkit.errors.ProtocolError` when the client broke the rules and an ``OSError``
    of the socket when it vanished. The caller closes the connection in every case but success.
    """
    return await _Handshake(channel, exports).run()


class _Handshake:
    def __init__(self, channel: Channel, exports: Exports) -> None:
        self._channel = channel
        self._exports = exports
        self._agreed = _Agreed()
        self._no_zeroes = False

    async def run(self) -> Negotiated | None:
        try:
            await self._greet()
            return await self._haggle()
        except EndOfStream as cause:
            raise ProtocolError(f"{cause} bytes of the handshake") from cause

    async def _greet(self) -> None:
        offered = nbd.HandshakeFlag.FIXED_NEWSTYLE | nbd.HandshakeFlag.NO_ZEROES
        await self._channel.write(nbd.greeting(offered))
        flags = nbd.parse_client_flags(await self._channel.read_exactly(nbd.CLIENT_FLAGS_SIZE))
        self._no_zeroes = nbd.ClientFlag.NO_ZEROES in flags

    async def _haggle(self) -> Negotiated | None:
        options_left = nbd.OPTIONS_BASE + nbd.OPTIONS_PER_EXPORT * len(self._exports)
        while True:
            try:
                raw = await self._channel.read_exactly(nbd.OPTION_HEADER_SIZE)
            except EndOfStream as cause:
                if cause.received == 0:
                    return None
                raise
            header = nbd.parse_option_header(raw)
            if options_left == 0:
                raise ProtocolError(f"option {header.option} is one too many for a session")
            options_left -= 1
            if header.option == Option.ABORT:
                await self._abort(header)
                return None
            negotiated = await self._option(header)
            if negotiated is not None:
                return negotiated

    async def _abort(self, header: OptionHeader) -> None:
        """Acknowledges; a client that gave up need not wait for it, nor send what it announced."""
        try:
            # A close with unread bytes pending would reset the connection under the answer.
            await self._channel.skip(header.length)
            await self._channel.write(nbd.option_reply(Option.ABORT, Reply.ACK))
        except (EndOfStream, ConnectionError):
            return

    async def _option(self, header: OptionHeader) -> Negotiated | None:
        """Reads the rest of one option and answers it."""
        option = header.option
        if header.length > nbd.OPTION_SIZE_MAX:
            await self._channel.skip(header.length)
            if option == Option.SET_META_CONTEXT:
                self._agreed.allocation_export = None
            text = f"{header.length} bytes of data are more than {nbd.OPTION_SIZE_MAX}"
            await self._refuse(option, ErrorReply.TOO_BIG, text)
            return None
        data = await self._channel.read_exactly(header.length)
        try:
            match option:
                case Option.EXPORT_NAME:
                    return await self._export_name(data)
                case Option.INFO | Option.GO:
                    return await self._info(option, data)
                case Option.LIST:
                    await self._list(data)
                case Option.STRUCTURED_REPLY:
                    await self._structured_reply(data)
                case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                    await self._meta_context(option, data)
                case Option.STARTTLS:
                    await self._refuse(option, ErrorReply.UNSUP, "TLS is not configured")
                case _:
                    text = f"option {option} is not known here"
                    await self._refuse(option, ErrorReply.UNSUP, text)
        except InvalidArgument as cause:
            await self._refuse(option, ErrorReply.INVALID, cause.message)
        return None

    async def _refuse(self, option: int, kind: ErrorReply, text: str) -> None:
        await self._channel.write(nbd.error_reply(option, kind, text))

    async def _export_name(self, data: bytes) -> Negotiated:
        """There is no way to say no to this option but to leave."""
        try:
            name = nbd.parse_export_name(data)
        except InvalidArgument as cause:
            raise ProtocolError(cause.message) from cause
        export = self._exports.find(name)
        if export is None:
            raise ProtocolError(_unknown(name))
        flags = self._flags(export)
        padded = not self._no_zeroes
        await self._channel.write(nbd.export_name_reply(export.info.size, flags, padded=padded))
        return self._negotiated(export)

    async def _info(self, option: int, data: bytes) -> Negotiated | None:
        request = nbd.parse_info_request(data)
        export = self._exports.find(request.name)
        if export is None:
            await self._refuse(option, ErrorReply.UNKNOWN, _unknown(request.name))
            return None
        info = export.info
        replies = [nbd.reply_info_export(option, info.size, self._flags(export))]
        if InfoType.NAME in request.types:
            replies.append(nbd.reply_info_text(option, InfoType.NAME, export.name))
        if InfoType.DESCRIPTION in request.types and export.description:
            text = nbd.reply_info_text(option, InfoType.DESCRIPTION, export.description)
            replies.append(text)
        if InfoType.BLOCK_SIZE in request.types:
            sizes = (info.block_size_min, info.block_size_preferred, info.payload_size_max)
            replies.append(nbd.reply_info_block_size(option, *sizes))
        replies.append(nbd.option_reply(option, Reply.ACK))
        await self._channel.write(b"".join(replies))
        return self._negotiated(export) if option == Option.GO else None

    async def _list(self, data: bytes) -> None:
        _no_data(data)
        replies = [nbd.reply_server(export.name, export.description) for export in self._exports]
        replies.append(nbd.option_reply(Option.LIST, Reply.ACK))
        await self._channel.write(b"".join(replies))

    async def _structured_reply(self, data: bytes) -> None:
        _no_data(data)
        self._agreed.structured = True
        await self._channel.write(nbd.option_reply(Option.STRUCTURED_REPLY, Reply.ACK))

    async def _meta_context(self, option: int, data: bytes) -> None:
        selecting = option == Option.SET_META_CONTEXT
        if selecting:
            # The earlier selection is gone even if this option fails.
            self._agreed.allocation_export = None
        if not self._agreed.structured:
            raise InvalidArgument("metadata contexts need structured replies first")
        request = nbd.parse_meta_context_request(data)
        export = self._exports.find(request.name)
        if export is None:
            await self._refuse(option, ErrorReply.UNKNOWN, _unknown(request.name))
            return
        wanted = nbd.ALLOCATION_CONTEXT_NAME in request.queries
        if not selecting:
            wanted = wanted or not request.queries or "base:" in request.queries
        replies = []
        if wanted:
            number = nbd.ALLOCATION_CONTEXT_ID if selecting else 0
            replies.append(nbd.reply_meta_context(option, number, nbd.ALLOCATION_CONTEXT_NAME))
        replies.append(nbd.option_reply(option, Reply.ACK))
        if selecting and wanted:
            self._agreed.allocation_export = export
        await self._channel.write(b"".join(replies))

    def _flags(self, export: Export) -> nbd.TransmissionFlag:
        return export.transmission_flags(structured=self._agreed.structured)

    def _negotiated(self, export: Export) -> Negotiated:
        selected = self._agreed.allocation_export is export
        return Negotiated(
            export,
            self._flags(export),
            self._agreed.structured,
            nbd.ALLOCATION_CONTEXT_ID if selected else None,
            self._channel.leftover(),
        )


def _no_data(data: bytes) -> None:
    if data:
        raise InvalidArgument(f"the option takes no data and came with {len(data)} bytes")


def _unknown(name: str) -> str:
    shown = name if len(name) <= _SHOWN_NAME_SIZE else name[:_SHOWN_NAME_SIZE] + "..."
    return f"there is no export named {shown!r}"
