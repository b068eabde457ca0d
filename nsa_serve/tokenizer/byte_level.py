"""GPT-2's alphabet of bytes: every byte as one visible character."""

from __future__ import annotations

from functools import cache


@cache
def byte_of_char() -> dict[str, int]:
    """Character -> byte. Visible Latin-1 stands for itself, the rest from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    table = {chr(byte): byte for byte in visible}
    table.update({chr(0x100 + i): byte for i, byte in enumerate(hidden)})
    return table
