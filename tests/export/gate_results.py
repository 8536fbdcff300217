"""What the tests of the gate read from its report."""


def checks(report) -> dict[str, bool]:
    return {check["check"]: check["passed"] for check in report["checks"]}


def failed(report) -> set[str]:
    return {name for name, passed in checks(report).items() if not passed}
