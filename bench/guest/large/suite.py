"""Modules of Python's own test suite: how many tests ran, failed and were skipped in each."""
import io
import os
import sys
import tempfile
import unittest
import warnings

MODULES = """array base64 binascii bisect bool builtin bytes calendar collections colorsys complex contextlib copy csv dataclasses decimal
deque dict difflib enum float format fractions functools generators glob heapq html int isinstance iter itertools json list long
operator ordered_dict pprint range re richcmp set slice sort string strtod struct textwrap types urlparse userdict uuid with zlib""".split()

# These measure time and fail on busy machines.
TIMED = ("test_denial_of_service", "anchor_at_beginning", "test_regression_gh94675", "test_uuid1")


def without_timed(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from without_timed(test)
        elif not any(name in test.id() for name in TIMED):
            yield test


warnings.simplefilter("ignore")
os.chdir(tempfile.mkdtemp())
import test.support

test.support.use_resources = []
for name in MODULES:
    result = unittest.TestResult()
    sys.stdout, sys.stderr, kept = io.StringIO(), io.StringIO(), (sys.stdout, sys.stderr)
    try:
        suite = unittest.defaultTestLoader.loadTestsFromName(f"test.test_{name}")
        unittest.TestSuite(without_timed(suite)).run(result)
    finally:
        sys.stdout, sys.stderr = kept
    # Some depend on how busy the machine is. What is really wrong fails twice.
    failed = sorted({getattr(case, "test_case", case).id() for case, _ in result.failures + result.errors})
    again = unittest.TestResult()
    for one in failed:
        print("again:", one, file=sys.stderr)
        unittest.defaultTestLoader.loadTestsFromName(one).run(again)
    print(name, result.testsRun, len(again.failures), len(again.errors))
    for case, why in again.failures + again.errors:
        print(" ", case, file=sys.stderr)
