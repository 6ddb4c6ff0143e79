"""Fakes `gcloud compute tpus queued-resources` and `sudo` for launch/tpu_vm.sh.

    fake_cloud.py gcloud|sudo ARGUMENTS

Every call is appended to $FAKE_CLOUD/calls.jsonl. `list` and `docker inspect` print the lines of
$FAKE_CLOUD/states and $FAKE_CLOUD/statuses, one per call. The state `fail` makes `list` fail; the
status `unreachable` makes `ssh` fail. `ssh` runs its command once in a local shell, so that quoting
is interpreted as on a host.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(os.environ["FAKE_CLOUD"])


def main(role: str, arguments: list[str]) -> int:
    with (FOLDER / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([role, *arguments]) + "\n")
    if role == "sudo":
        if arguments[:2] == ["docker", "inspect"]:
            return print_line(next_line("statuses"), failure="none")
        return 0
    assert arguments[:3] == ["compute", "tpus", "queued-resources"], arguments
    call = parser().parse_args(arguments[3:])
    if call.verb == "list":
        return print_line(next_line("states"), failure="fail")
    if call.verb == "ssh":
        if (FOLDER / "statuses").read_text().startswith("unreachable"):
            next_line("statuses")
            return 255
        # A remote shell does not have the script's variables.
        environment = {name: os.environ[name] for name in ("PATH", "FAKE_CLOUD")}
        return subprocess.run(["bash", "-c", call.command], env=environment).returncode
    return 0


def parser() -> argparse.ArgumentParser:
    """Returns a parser of those gcloud flags that the script may use."""
    gcloud = argparse.ArgumentParser(allow_abbrev=False)
    verbs = gcloud.add_subparsers(dest="verb", required=True)
    flags = {
        "create": ("accelerator-type", "runtime-version"),
        "list": ("filter", "format"),
        "ssh": ("node", "worker", "command"),
        "delete": (),
    }
    for verb, names in flags.items():
        verb_parser = verbs.add_parser(verb, allow_abbrev=False)
        if verb != "list":
            verb_parser.add_argument("name")
        for name in ("zone", *names):
            verb_parser.add_argument(f"--{name}", required=True)
        if verb == "create":
            verb_parser.add_argument("--spot", action="store_true")
            nodes = verb_parser.add_mutually_exclusive_group(required=True)
            nodes.add_argument("--node-id")
            nodes.add_argument("--node-count", type=int)
            verb_parser.add_argument("--node-prefix")
        if verb == "delete":
            verb_parser.add_argument("--force", action="store_true", required=True)
            verb_parser.add_argument("--quiet", action="store_true", required=True)
    return gcloud


def next_line(name: str) -> str:
    """Removes the first line of a file and returns it."""
    path = FOLDER / name
    line, _, remaining = path.read_text().partition("\n")
    path.write_text(remaining)
    return line


def print_line(line: str, failure: str) -> int:
    """Prints a line and returns 0, or returns 1 if the line is `failure`."""
    if line == failure:
        return 1
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
