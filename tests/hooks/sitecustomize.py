"""For the worker processes of a test's cluster: each notes what it begins, and waits there while a
test says so.

Python imports this file by its name wherever its folder is on PYTHONPATH. The folder
TASKPACK_TEST_NOTES gets a line "process what" in `begun` for each trial, fit and selection that
begins, and is looked at for a file `hold-<kind>`: while it is there, what has begun does not go on.
"""

import importlib.abc
import importlib.util
import os
import sys
import time

FOLDER = os.environ.get("TASKPACK_TEST_NOTES")
# Where each begins: module, function, kind.
BEGINNINGS = {
    "pipeline.search.trial": ("run_trial", "trial"),
    "pipeline.training.fit": ("_train_and_pack", "fit"),
    "pipeline.selection.gradient": ("gradient_sums", "select"),
}


def noted(kind, function):
    def begin(*arguments, **options):
        with open(os.path.join(FOLDER, "begun"), "a") as notes:
            notes.write(f"{os.getpid()} {kind}\n")
        while os.path.exists(os.path.join(FOLDER, f"hold-{kind}")):
            time.sleep(0.05)
        return function(*arguments, **options)

    return begin


class Notes(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in BEGINNINGS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        load = spec.loader.exec_module

        def load_and_note(module):
            load(module)
            function, kind = BEGINNINGS[name]
            setattr(module, function, noted(kind, getattr(module, function)))

        spec.loader.exec_module = load_and_note
        return spec


if FOLDER:
    sys.meta_path.insert(0, Notes())
