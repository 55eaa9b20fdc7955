"""Software development: parsers that work on any input, and a small fixed project."""

import base64
import datetime
import hashlib
import json
import re

from .places import TODAY, draw


LICENSES = {"requests": "Apache-2.0", "numpy": "BSD-3-Clause", "flask": "BSD-3-Clause", "django": "BSD-3-Clause"}
PORTS = {22: "SSH", 25: "SMTP", 53: "DNS", 80: "HTTP", 443: "HTTPS", 3306: "MySQL", 5432: "PostgreSQL", 6379: "Redis"}
STATUS = {200: "OK", 301: "Moved Permanently", 404: "Not Found", 418: "I'm a teapot", 429: "Too Many Requests"}
STATUS |= {
    401: "Unauthorized",
    403: "Forbidden",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
}


def format_json(text: str) -> dict:
    """Check that a piece of JSON is valid and count its keys.

    Args:
        text: The JSON text.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        return {"valid": False, "problem": str(error)}
    return {"valid": True, "keys": len(value) if isinstance(value, (dict, list)) else 0}


def try_regex(pattern: str, text: str) -> dict:
    """Try a regular expression on a text and list its matches.

    Args:
        pattern: The regular expression.
        text: The text to search.
    """
    try:
        found = re.findall(pattern, text[:200])
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return {"matches": len(found), "first": str(found[0]) if found else ""}


def hash_text(text: str, algorithm: str = "sha256") -> dict:
    """Compute the checksum of a text.

    Args:
        text: The text.
        algorithm: Hash function. (choices: ["md5", "sha1", "sha256"])
    """
    return {"digest": hashlib.new(algorithm, text.encode()).hexdigest()[:16], "algorithm": algorithm}


def generate_password(length: int = 16) -> dict:
    """Make up a strong password.

    Args:
        length: Number of characters.
    """
    signs = "abcdefghjkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789!?-_"
    return {"password": "".join(signs[int(len(signs) * draw("pw", length, i))] for i in range(min(length, 64)))}


def decode_base64(text: str) -> dict:
    """Decode a Base64 string to readable text.

    Args:
        text: The encoded string.
    """
    try:
        return {"decoded": base64.b64decode(text, validate=True).decode()}
    except ValueError:
        raise ValueError("this is not Base64 of a text") from None


def explain_cron(expression: str) -> dict:
    """Explain at which times a cron schedule runs a job.

    Args:
        expression: The five fields of the schedule.
    """
    fields = expression.split()
    if len(fields) != 5:
        raise ValueError("a cron expression has five fields")
    names = ("minute", "hour", "day", "month", "weekday")
    return {"runs": ", ".join(f"{n} {f}" for n, f in zip(names, fields, strict=True) if f != "*") or "every minute"}


def hex_to_rgb(color: str) -> dict:
    """Convert a color from hexadecimal to red, green and blue.

    Args:
        color: The color, such as #ff8800.
    """
    digits = color.lstrip("#")
    if not re.fullmatch(r"[0-9a-fA-F]{6}", digits):
        raise ValueError("write the color with six hexadecimal digits")
    return {"red": int(digits[:2], 16), "green": int(digits[2:4], 16), "blue": int(digits[4:], 16)}


def parse_timestamp(seconds: int) -> dict:
    """Convert a Unix timestamp to a date and time.

    Args:
        seconds: Seconds since 1970.
    """
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return {"date": str(moment.date()), "time": f"{moment:%H:%M}"}


def compare_versions(first: str, second: str) -> dict:
    """Tell which of two version numbers is newer.

    Args:
        first: One version.
        second: The other version.
    """

    def key(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)]

    return {"newer": first if key(first) >= key(second) else second}


def http_status(code: int) -> dict:
    """Explain what an HTTP status code of a server means.

    Args:
        code: The status code.
    """
    return {"meaning": STATUS.get(code, "not a common code"), "error": code >= 400}


def lookup_port(port: int) -> dict:
    """Tell which network service usually listens on a port.

    Args:
        port: Number of the port.
    """
    return {"service": PORTS.get(port, "none in particular"), "privileged": port < 1024}


def search_issues(word: str) -> dict:
    """Search the bug tracker of the project for open issues.

    Args:
        word: What to look for.
    """
    return {"open": int(9 * draw("bugs", word)), "newest": f"#{100 + int(800 * draw('bug', word))} {word}"}


def create_issue(title: str) -> dict:
    """File a bug report or feature request in the project's tracker.

    Args:
        title: What is wrong or wanted.
    """
    return {"issue": f"#{900 + int(90 * draw('new', title))}", "title": title}


def pull_request_status(number: int) -> dict:
    """Tell whether a pull request is approved and its checks have passed.

    Args:
        number: Number of the pull request.
    """
    return {"approvals": int(3 * draw("pr", number)), "checks": "passed" if draw("ci", number) > 0.3 else "failed"}


def build_status(branch: str = "main") -> dict:
    """Report the result of the latest continuous integration run on a branch.

    Args:
        branch: Name of the branch.
    """
    return {"result": "green" if draw("build", branch) > 0.4 else "red", "minutes": 3 + int(12 * draw("len", branch))}


def deploy_service(service: str, environment: str) -> dict:
    """Roll a service out to an environment.

    Args:
        service: Name of the service.
        environment: Where to. (choices: ["staging", "production"])
    """
    return {"service": service, "environment": environment, "release": f"r{100 + int(900 * draw('rel', service))}"}


def server_health(server: str) -> dict:
    """Report load, memory and uptime of a server.

    Args:
        server: Name of the server.
    """
    return {"cpu_percent": int(100 * draw("cpu", server)), "memory_percent": 20 + int(75 * draw("mem", server))}


def search_logs(service: str, word: str = "error") -> dict:
    """Search a service's log files for messages of the last hour.

    Args:
        service: Name of the service.
        word: What to look for.
    """
    return {"lines": int(40 * draw("log", service, word)), "last": f"{word} in {service}"}


def check_license(package: str) -> dict:
    """Tell under which license a software package is published.

    Args:
        package: Name of the package.
    """
    return {"license": LICENSES.get(package.lower(), "MIT"), "commercial_use": True}


def latest_version(package: str) -> dict:
    """Look up the newest release of a software package.

    Args:
        package: Name of the package.
    """
    minor = int(20 * draw("minor", package))
    return {
        "version": f"{1 + int(4 * draw('major', package))}.{minor}.0",
        "released": str(TODAY - datetime.timedelta(minor)),
    }
