"""Runs `pip install` in this environment, independently of the user's pip settings.

usage: .venv/bin/python launch/pip_install.py OPTION ...

Uses the user's settings of indexes, proxies, certificates and cache. Ignores all others, such as
`user`, `target`, `constraint` or `require-hashes`, which are meant for other environments. The
output of pip goes to .venv/pip.log; the reason of a failure is printed in one line.
"""

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

_KEPT = {
    "cache-dir",
    "cert",
    "client-cert",
    "default-timeout",
    "extra-index-url",
    "find-links",
    "index-url",
    "keyring-provider",
    "no-cache-dir",
    "no-index",
    "no-input",
    "prefer-binary",
    "proxy",
    "resume-retries",
    "retries",
    "timeout",
    "trusted-host",
    "use-deprecated",
    "use-feature",
}
_REASONS = (
    (
        r"No space left|Disk quota exceeded",
        "no space left: free some space, or set TMPDIR to a larger folder",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED",
        "the certificate of the package index is not trusted: set PIP_CERT to your organisation's",
    ),
    (
        r"Retrying .*(NewConnection|NameResolution|Timeout|Proxy|ProtocolError|Connection refused)",
        "the package index cannot be reached: check network and proxy, or set PIP_INDEX_URL to a "
        "mirror",
    ),
)


def settings(listing: str, variables: dict[str, str]) -> dict[str, str]:
    """Returns the environment variables for pip.

    Args:
        listing: output of `pip config list`, lines of `section.name='value'`.
        variables: environment variables; PIP_ variables override the listing.
    """
    kept = {name: value for name, value in variables.items() if not name.startswith("PIP_")}
    kept["PIP_CONFIG_FILE"] = os.devnull
    lines = [line.partition("=") for line in listing.splitlines()]
    for section in ("global.", "install."):
        for key, _, value in lines:
            if key.startswith(section) and key[len(section) :] in _KEPT:
                kept[_variable(key[len(section) :])] = ast.literal_eval(value)
    for name, value in variables.items():
        if value and name[:4] == "PIP_" and name[4:].lower().replace("_", "-") in _KEPT:
            kept[name] = value
    return kept


def _variable(name: str) -> str:
    return "PIP_" + name.upper().replace("-", "_")


def reason(log: str) -> str:
    """Returns the reason why pip failed, given its output."""
    for pattern, text in _REASONS:
        if re.search(pattern, log):
            return text
    # Errors of a build are indented.
    errors = re.findall(r"^\s*error: (?!subprocess-exited)(.+)$", log, re.IGNORECASE | re.MULTILINE)
    return errors[-1].strip() if errors else "see the log"


def main(options: list[str]) -> int:
    """Returns 0, or 2 after printing the reason of the failure."""
    pip = [sys.executable, "-I", "-m", "pip"]
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PIP_") or name == "PIP_CONFIG_FILE"
    }
    # `user = true` would make `config list` skip the other configuration files.
    done = subprocess.run(
        [*pip, "config", "list"],
        env={**plain, "PIP_USER": "0"},
        text=True,
        capture_output=True,
        check=False,
    )
    log = Path(sys.prefix) / "pip.log"
    if done.returncode:
        log.write_text(done.stdout + done.stderr)
    else:
        # At Ctrl-C pip rolls back its changes; this process waits for it.
        signal.signal(signal.SIGINT, lambda *_: None)
        with log.open("w") as file:
            done = subprocess.run(
                [*pip, "install", "--quiet", "--disable-pip-version-check", *options],
                env=settings(done.stdout, dict(os.environ)),
                stderr=file,
                check=False,
            )
    if done.returncode:
        print(
            f"launch/install.sh: pip failed: {reason(log.read_text(errors='replace'))} "
            "(full output: .venv/pip.log)",
            file=sys.stderr,
        )
    return 2 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
