"""`gcloud compute tpus queued-resources` and `sudo`, as launch/tpu_vm.sh meets them.

    fake_cloud.py gcloud|sudo ARGUMENTS

Every call is added to $FAKE_CLOUD/calls.jsonl. What `list` and `docker inspect` answer is read from
$FAKE_CLOUD/states and $FAKE_CLOUD/statuses, a line a call. The state `fail` is a `list` that fails,
the status `unreachable` a host that `ssh` cannot reach.
`ssh` runs its command here in a shell, once, so that what it quotes is seen as a host would see it.
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
            return say(answer("statuses"), unless="none")
        return 0
    assert arguments[:3] == ["compute", "tpus", "queued-resources"], arguments
    call = parser().parse_args(arguments[3:])
    if call.verb == "list":
        return say(answer("states"), unless="fail")
    if call.verb == "ssh":
        if (FOLDER / "statuses").read_text().startswith("unreachable"):
            answer("statuses")
            return 255
        # As a remote shell, it knows nothing of the script's variables.
        known = {name: os.environ[name] for name in ("PATH", "FAKE_CLOUD")}
        return subprocess.run(["bash", "-c", call.command], env=known).returncode
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags of gcloud's reference that the script may use; any other is an error."""
    found = argparse.ArgumentParser(allow_abbrev=False)
    verbs = found.add_subparsers(dest="verb", required=True)
    flags = {
        "create": ("accelerator-type", "runtime-version"),
        "list": ("filter", "format"),
        "ssh": ("node", "worker", "command"),
        "delete": (),
    }
    for verb, names in flags.items():
        one = verbs.add_parser(verb, allow_abbrev=False)
        if verb != "list":
            one.add_argument("name")
        for name in ("zone", *names):
            one.add_argument(f"--{name}", required=True)
        if verb == "create":
            one.add_argument("--spot", action="store_true")
            nodes = one.add_mutually_exclusive_group(required=True)
            nodes.add_argument("--node-id")
            nodes.add_argument("--node-count", type=int)
            one.add_argument("--node-prefix")
        if verb == "delete":
            one.add_argument("--force", action="store_true", required=True)
            one.add_argument("--quiet", action="store_true", required=True)
    return found


def answer(kind: str) -> str:
    """The next line of a file, which it takes away."""
    path = FOLDER / kind
    line, _, rest = path.read_text().partition("\n")
    path.write_text(rest)
    return line


def say(line: str, unless: str) -> int:
    """Prints a line, or fails if it is this one."""
    if line == unless:
        return 1
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
