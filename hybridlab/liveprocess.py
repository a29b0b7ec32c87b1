"""The process that a `Session` starts, from its first line: it ends with its parent even while PyTorch is imported."""

from __future__ import annotations

import os

import msgspec

from hybridlab import children
from hybridlab.errors import HybridlabError
from hybridlab.session import Asked, Failed, Progress, Said


def main() -> None:
    """Says a line of JSON a message on what was stdout, where nothing else can write any more."""
    channel = children.channel()
    encoder = msgspec.json.Encoder()

    def tell(said: Said) -> None:
        os.write(channel, encoder.encode(said) + b"\n")

    asked = children.asked(msgspec.json.Decoder(Asked).decode)
    tell(Progress("importing PyTorch", 0, 1))
    try:
        from hybridlab import live  # seconds, in which a kernel may be restarted

        live.serve(asked, tell, children.told)
    except HybridlabError as error:
        tell(Failed(str(error)))
    except Exception as error:  # it must reach the page, whatever it is
        tell(Failed(f"{type(error).__name__}: {error}"))
        raise


if __name__ == "__main__":
    main()
