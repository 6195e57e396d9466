"""The command line: arguments, streams and exit codes. Every command is one call of the library.

stdout carries data only, everything else goes to stderr, and a failure is one line. Exit codes: 0 done, 1 a
check failed, 2 bad usage or input, 130 interrupted, 141 when the reader of stdout went away. This module never
decodes, matches or formats.
"""

from __future__ import annotations

import argparse
import errno
import gc
import io
import os
import shutil
import sys
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from nattrace import __version__
from nattrace.cli import capture as capture_command
from nattrace.errors import NattraceError, UsageError
from nattrace.report import (
    REPORT_FORMATS,
    ROW_FORMATS,
    report_format,
    row_format,
    whole_file,
    write_report,
    write_rows,
)
from nattrace.report.escape import terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TextIO

EXIT_DONE: Final = 0
EXIT_BAD_INPUT: Final = 2
EXIT_INTERRUPTED: Final = 130
#: What a shell reports for a tool that SIGPIPE (13) ended: 128 + 13.
EXIT_BROKEN_PIPE: Final = 141

#: Set to anything but the empty string, an unexpected error shows its traceback.
DEBUG_VARIABLE: Final = "NATTRACE_DEBUG"

#: Narrowest and widest text that the tables are made for; a terminal outside is treated as one of these.
MIN_WIDTH: Final = 80
MAX_WIDTH: Final = 400

_SOURCE_HELP = (
    "a pcap or pcapng file (plain, .gz, .xz, .bz2, .zst), a bundle folder or archive (.tar, .tar.gz, .zip), a "
    "text file of tcpdump's printed output, or - for stdin; one observation point each, named after the file or as NAME=FILE"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` are those after the program's name."""
    debug = bool(os.environ.get(DEBUG_VARIABLE))
    if not debug and not sys.warnoptions:
        # A library's warning is no message to the user.
        warnings.simplefilter("ignore")
    try:
        _utf8_output()
        words, workload = capture_command.split_workload(
            list(sys.argv[1:] if arguments is None else arguments)
        )
        parsed = _parser().parse_args(words)
        parsed.workload = workload
        run = cast("Callable[[argparse.Namespace], None]", parsed.run)
        with _without_collector():
            run(parsed)
        sys.stdout.flush()
    except SystemExit as finished:  # argparse, after --help and --version
        return finished.code if isinstance(finished.code, int) else EXIT_DONE
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        _abandon_stdout()
        return EXIT_BROKEN_PIPE
    except NattraceError as error:
        return _fail(str(error))
    except MemoryError:
        return _fail("not enough memory for this input: try a part of it (editcap -c, tcpdump -C)")
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EIO}:
            _abandon_stdout()
        return _fail(_os_error(error))
    except Exception as error:  # noqa: BLE001 - the last line of defence: no input may end in a traceback
        if debug:
            traceback.print_exc()
        return _fail(_unexpected(error))
    return EXIT_DONE


# --- commands --------------------------------------------------------------------------------------------


def _analyze(arguments: argparse.Namespace) -> None:
    chosen = arguments.format or (report_format(arguments.output) if _is_file(arguments) else "table")
    report = _report(arguments, arguments.sources)
    with _output(arguments) as (stream, width):
        write_report(report, stream, chosen, limit=arguments.limit, width=width)


def _rewrites(arguments: argparse.Namespace) -> None:
    chosen = arguments.format or (row_format(arguments.output) if _is_file(arguments) else "table")
    report = _report(arguments, arguments.sources, rows=True)
    rows = report.rewrites.all() if arguments.all else report.rewrites
    with _output(arguments) as (stream, width):
        write_rows(rows, stream, chosen, width=width)


def _bundle(arguments: argparse.Namespace) -> None:
    from nattrace.bundle.writing import assemble  # noqa: PLC0415 - only this command needs it

    manifest = assemble(arguments.files, arguments.folder)
    _message(f"bundle {arguments.folder}: {', '.join(point.name for point in manifest.points)}")


def _capture(arguments: argparse.Namespace) -> None:
    folder = capture_command.run(arguments, _message)
    if folder is not None and arguments.analyze:
        report = _report(arguments, [folder])
        with _output(arguments) as (stream, width):
            write_report(report, stream, "table", width=width)


def _install_tcpdump(arguments: argparse.Namespace) -> None:
    capture_command.install(arguments, _message)


def _demo(arguments: argparse.Namespace) -> None:
    from importlib.resources import as_file, files  # noqa: PLC0415 - only this command needs it

    with as_file(files("nattrace").joinpath("samples")) as folder:
        sources = [str(folder / "docker0.pcap"), str(folder / "eth0.pcap")]
        _message(f"four containers ping one address through Docker: nattrace analyze {' '.join(sources)}")
        arguments.dissector = "native"
        report = _report(arguments, sources)
        with _output(arguments) as (stream, width):
            write_report(report, stream, arguments.format or "table", width=width)


def _schema(arguments: argparse.Namespace) -> None:
    from nattrace.report.schema import schema_text  # noqa: PLC0415 - only this command needs it

    sys.stdout.write(schema_text(arguments.of))


def _report(arguments: argparse.Namespace, sources: Sequence[str], *, rows: bool = False) -> Any:
    """Return the report of `sources`, with a progress bar for whoever waits; packets are kept only for `rows`."""
    import nattrace  # noqa: PLC0415 - numpy is not needed to print a version or a schema
    from nattrace.heap import prepare_heap  # noqa: PLC0415
    from nattrace.processor import load_numpy  # noqa: PLC0415
    from nattrace.progress import progress_bar  # noqa: PLC0415

    prepare_heap()
    load_numpy()
    if sources.count("-") > 1:
        raise UsageError("stdin can be read only once: give - once, name the other sources")
    with progress_bar(sys.stderr) as progress:
        return nattrace.analyze(*sources, dissector=arguments.dissector, rows=rows, progress=progress)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Leave cyclic garbage alone while a command runs.

    What a command makes lives until it ends and holds no cycles; the collector would walk all of it again and
    again. Measured: a fourth of the time that 48,000 flows take to be written.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# --- arguments -------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, as every other error is."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nattrace",
        description="What did NAT do to my packets? Explains rewrites from packet captures alone.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nattrace {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser, dest="command"
    )

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    analyze = command("analyze", _analyze, "report points, flows with their translations, and findings")
    _add_sources(analyze)
    _add_output(analyze, REPORT_FORMATS)
    _add_limit(analyze)

    rewrites = command("rewrites", _rewrites, "one row for each packet that NAT rewrote")
    _add_sources(rewrites)
    _add_output(rewrites, ROW_FORMATS)
    rewrites.add_argument(
        "--all", action="store_true", help="add crossings without rewrite, losses and ambiguities"
    )

    bundle = command("bundle", _bundle, "put captures, tcpdump's messages and context files into one bundle")
    bundle.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a capture, as NAME=FILE to name its point; what tcpdump printed on stderr; a context file",
    )
    bundle.add_argument("-w", "--write", dest="folder", required=True, metavar="DIR", help="a new folder")

    capture = command("capture", _capture, "capture on several interfaces at once and leave a bundle")
    capture.usage = "%(prog)s [OPTION...] [-- COMMAND...]"
    capture_command.add_arguments(capture)
    capture.set_defaults(dissector="native", output=None)

    install = command(
        "install-tcpdump",
        _install_tcpdump,
        "put a tcpdump that needs no libraries into a folder of this machine",
    )
    capture_command.add_install_arguments(install)

    demo = command("demo", _demo, "analyse captures that ship with nattrace: no root, no Docker, no network")
    demo.add_argument("-f", "--format", choices=REPORT_FORMATS, help="form of the output (table)")
    demo.set_defaults(output=None)

    schema = command("schema", _schema, "print the JSON Schema of the report")
    schema.add_argument(
        "of",
        nargs="?",
        choices=("report", "rewrites", "bundle"),
        default="report",
        help="the report (default), a row of rewrites -f jsonl, or a bundle's manifest",
    )
    return parser


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=_SOURCE_HELP)
    parser.add_argument(
        "--dissector",
        choices=("native", "tshark"),
        default="native",
        help="who decodes link layers that nattrace does not know (native: nobody, they are counted)",
    )


def _add_output(parser: argparse.ArgumentParser, formats: Sequence[str]) -> None:
    parser.add_argument("-f", "--format", choices=formats, help="form of the output (table)")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="write to FILE, whole or not at all; its suffix picks the form unless -f does",
    )


def _add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit",
        type=_flow_limit,
        metavar="N",
        help="flows that the table shows for each path, 0 for all (40)",
    )


def _flow_limit(text: str) -> int:
    # isdecimal alone accepts digits of every script; int() refuses thousands of digits.
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of flows")
    return int(text)


# --- streams ---------------------------------------------------------------------------------------------


def _is_file(arguments: argparse.Namespace) -> bool:
    return arguments.output not in {None, "-"}


@contextmanager
def _output(arguments: argparse.Namespace) -> Iterator[tuple[TextIO, int | None]]:
    """Give the stream that the data goes to and the columns it has, None for any number."""
    if not _is_file(arguments):
        yield sys.stdout, _width(sys.stdout)
        return
    _spare_sources(arguments.output, arguments.sources)
    try:
        with whole_file(arguments.output) as stream:
            yield stream, None
    except OSError as error:
        if error.filename is None and not isinstance(error, BrokenPipeError):
            # A write that fails (disk full) does not say to which file.
            error.filename = arguments.output
        raise


def _spare_sources(output: str, sources: Sequence[str]) -> None:
    """Raise UsageError when the output would replace one of the captures."""
    for source in sources:
        for name in {source, source.partition("=")[2]} - {"", "-"}:
            try:
                same = Path(output).samefile(name) and Path(name).is_file()
            except (OSError, ValueError):
                continue
            if same:
                raise UsageError(f"{output}: this is a source; write the output to another file")


def _width(stream: TextIO) -> int | None:
    if not stream.isatty():
        return None
    return max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size((MIN_WIDTH, 24)).columns))


def _utf8_output() -> None:
    """Make stdout and stderr the same in every locale: UTF-8, LF, and no character that cannot be written."""
    if sys.stdout is None:
        raise UsageError("stdout is closed: there is nowhere to write to")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")


def _abandon_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not fail once more."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        return


# --- messages --------------------------------------------------------------------------------------------


def _message(text: str) -> None:
    """Write one line to stderr, if there is one."""
    if sys.stderr is not None:
        try:
            sys.stderr.write(f"nattrace: {terminal(text)}\n")
            sys.stderr.flush()
        except OSError:
            return


def _fail(text: str, code: int = EXIT_BAD_INPUT) -> int:
    _message(text)
    return code


def _os_error(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return (
        f"{os.fsdecode(error.filename)}: {reason}"
        if isinstance(error.filename, str | bytes)
        else f"input or output failed: {reason}"
    )


def _unexpected(error: Exception) -> str:
    place = ""
    if error.__traceback__ is not None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f" at {Path(frame.filename).name}:{frame.lineno}"
    return (
        f"internal error, please report it with the input: {type(error).__name__}: {error}{place} "
        f"({DEBUG_VARIABLE}=1 shows the traceback)"
    )
