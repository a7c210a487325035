"""Write report.html for one run, or one page that compares several runs, from the files in their folders alone.

    python tools/report.py RUN                   RUN/report.html
    python tools/report.py RUN1 RUN2 ...         compare.html in the current folder
    --out FILE                                   where to write the page
    --data_root DIR                              where the images are now

Needs neither torch nor the training script. A missing file costs only the sections that need it. A page works offline, and its
bytes depend on the input alone: no clock, no random state. Text from the data counts as hostile: everything is escaped, and the
only script in the page reads nothing but the page.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from report_comparison import describe_comparison
from report_page import describe_run
from run_files import Pictures, ReportError, Shot, format_gain, format_number, parse_options, read_run

MARK = b'<meta name="generator" content="lct_dino3 report">'  # a file with this near its start may be overwritten


def main(argv: Sequence[str] | None = None) -> int:
    """Write a page; return the exit code: 0 done, 2 a run or file that cannot be used, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python lct_dino3.py report",
        description="Make one page of a run, or one that compares several.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="out_dir of a run; several are compared")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html; compare.html for several runs)"
    )
    parser.add_argument(
        "--data_root", type=Path, metavar="DIR", help="where the pictures are now (default: as in the run)"
    )
    options = parse_options(parser, argv)
    try:
        path = make_page(options.runs, options.out, options.data_root)
    except (ReportError, OSError) as error:  # OSError: no permission on a folder, too long a name
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:  # valid JSON, wrong content
        place = traceback.extract_tb(error.__traceback__)[-1].name
        names = ", ".join(map(str, options.runs))
        print(f"error: a file of {names} holds what no run writes: {error!r} in {place}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted (SIGINT); the same command starts again", file=sys.stderr)
        return 130
    with contextlib.suppress(OSError):  # nobody listens any more, or the disk is full
        print(f"written: {path}", flush=True)
    return 0


def make_page(folders: list[Path], out: Path | None, data_root: Path | None) -> Path:
    """Write the page of one run, or the comparison of several, and return its path."""
    runs = [read_run(folder) for folder in folders]
    pictures = [Pictures(run, data_root) for run in runs]
    if len(runs) == 1:
        path = out or folders[0] / "report.html"
        page = render(describe_run(runs[0], pictures[0]), pictures[0].uri)
    else:
        path = out or Path("compare.html")

        def find_picture(shot: Shot | None) -> str | None:
            return next((uri for source in pictures if (uri := source.uri(shot))), None)

        page = render(describe_comparison(runs), find_picture)
    for source in pictures:
        if path.resolve().is_relative_to(source.root.resolve()):
            raise ReportError(f"--out {path} lies inside data_root {source.root}: give another --out")
        if path.exists() and not source.root.is_dir():
            problem = f"{source.root} is gone, and {path} with its pictures stays as it is"
            raise ReportError(f"{problem}: --data_root DIR says where they are now, --out FILE makes a page without")
    write_page(path, page, may_overwrite=out is None and len(runs) == 1)
    if missing := set.intersection(*(source.missing for source in pictures)):
        remedy = "--data_root DIR says where they are now"
        print(f"note: pictures that cannot be read: {len(missing):,}; {remedy}", file=sys.stderr)
    return path


def render(context: dict[str, Any], thumbnail: Callable[[Shot | None], str | None]) -> bytes:
    """Return a page as UTF-8. Names with lone surrogates (bytes that are not Unicode) are shown escaped, never a crash."""
    return load_template().render(context, thumbnail=thumbnail).encode("utf-8", "backslashreplace")


@functools.cache
def load_template() -> Any:
    """Return the jinja2 template of the page, compiled once: half of the time of a small page."""
    import jinja2
    from markupsafe import Markup

    def digest(script: str) -> str:
        return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    def breakable(name: str) -> str:
        return Markup("<wbr>").join(re.split(r"(?<=[_./-])(?=.)", name))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a misspelled name in the template is a bug, not an empty cell
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        num=format_number, gain=format_gain, count="{:,}".format, digest=digest, breakable=breakable
    )
    return environment.get_template("report.html.j2")


def write_page(path: Path, page: bytes, *, may_overwrite: bool) -> None:
    """Write a page atomically. Raises ReportError, also for an existing file without MARK unless `may_overwrite`."""
    if path.is_dir():
        raise ReportError(f"--out {path} is a folder: give the path of a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not may_overwrite:
            with open(path, "rb") as file:
                if MARK not in file.read(4096):
                    raise ReportError(f"{path} is not a page of this tool and is not overwritten: give another --out")
        with open(temporary, "wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror}; give --out FILE elsewhere") from error
    finally:
        with contextlib.suppress(OSError):  # a read-only disk refuses even to delete a missing file
            temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  it may be closed
    sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show
    os._exit(main())  # without another try to print what could not be printed, which would change the code
