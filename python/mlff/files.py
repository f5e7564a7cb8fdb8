"""Files that are written whole or not at all."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator


@contextmanager
def replacing(path) -> Iterator[Path]:
    """A file to write in place of `path`, which takes its name at the end.

    An interruption or a full disk leaves what was there. Raises OSError, naming `path`, whatever the writer raised.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        yield unfinished
        with open(unfinished, "rb") as f:
            os.fsync(f.fileno())  # else a power failure could leave the new name without the content
        unfinished.replace(path)
    except Exception as e:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written, what was there is unchanged: {e}") from e
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
