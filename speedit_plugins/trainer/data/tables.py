"""Reads tables from CSV files."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path


def read_header(file: Path) -> list[str]:
    """The column names of a CSV file, stripped of white space; [] for an empty file.

    Raises:
        ValueError: the first line is not UTF-8 or not CSV.
        OSError: the system fails to read the file.
    """
    try:
        # utf-8-sig: spreadsheet programs write a byte-order mark before the first column's name.
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return [name.strip() for name in next(csv.reader(lines, strict=True), [])]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{file}, line 1: wanted CSV: {error}") from error


def read_table(
    file: Path, columns: Sequence[str], *, optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, values by column name) for each row.

    The line number is that of the row's last line in the file. Blank lines are skipped. Names and values are
    stripped of surrounding white space.

    Args:
        file: a UTF-8 file whose first line has the column names.
        columns: required columns.
        optional: columns that may be absent.

    Raises:
        ValueError: the file is not UTF-8 or not CSV, one of these columns is missing or appears twice, or a
            row has more or fewer values than there are columns. The message names the file and, except for
            UTF-8 errors, the line.
        OSError: the system fails to read the file.
    """
    try:
        # utf-8-sig: spreadsheet programs write a byte-order mark before the first column's name.
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for name in (*columns, *(name for name in optional if name in header)):
                if header.count(name) != 1:
                    got = ", ".join(header) or "nothing"
                    raise ValueError(f"{file}, line 1: wanted one column {name!r}, got {got}")
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    hint = "; text with commas needs quotes" if len(fields) > len(header) else ""
                    got = f"wanted {len(header)} fields, got {len(fields)}{hint}"
                    raise ValueError(f"{file}, line {reader.line_num}: {got}")
                yield reader.line_num, dict(zip(header, map(str.strip, fields), strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: wanted CSV: {error}") from error
