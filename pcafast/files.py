"""Writing files so that a killed process or a full disk never leaves half of one."""

import errno
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from pcafast.errors import FileError


def write_atomically(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write several files so that each is either its old self or wholly new.

    Every file is first written beside its target and flushed to the disk; only when all are complete
    are they renamed into place, in the order given.

    Args:
        writers: for each target path, the function that writes the content to the path it is handed.

    Raises:
        FileError: the disk is full or the place not writable. The targets are as they were, unless it was a renaming
            that failed, in which case the message names those that are new.
    """
    staged: dict[Path, Path] = {}
    renamed: list[str] = []
    try:
        for path, write in writers.items():
            target = path.resolve()  # through a symbolic link, which stays one
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, "there is a folder of that name")
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            os.close(handle)
            staged[target] = Path(name)
            write(staged[target])
            with open(name, "rb+") as written:
                os.fsync(written.fileno())
        mode = 0o666 & ~_umask()
        for target, temporary in staged.items():
            temporary.chmod(mode)
            temporary.replace(target)
            renamed.append(str(target))
    except OSError as error:
        reason = error.strerror or str(error)
        changed = f"Only {', '.join(renamed)} had been written anew" if renamed else "Nothing was changed"
        raise FileError(
            f"cannot write {', '.join(str(path) for path in writers)}: {reason}. "
            f"{changed}; free some space or choose another place."
        ) from error
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
