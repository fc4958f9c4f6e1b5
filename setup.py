"""Puts the small checkpoints into the wheel; everything else is said in pyproject.toml.

Their home is the folder `checkpoints/`. A wheel holds copies in `metatele/checkpoints/`, made when it is built.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

IN_THE_WHEEL = ("general", "lr-tele", "transfer")  # 0.7 MB together; the two others take 27 MB


class BuildWithCheckpoints(build_py):
    """Copies the checkpoints; an editable install reads them where they lie."""

    def run(self):
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            for source, target in self._copies():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode=True):
        """What is built, the copies too."""
        return [*super().get_outputs(include_bytecode), *(str(target) for _, target in self._copies())]

    def _copies(self):
        files = [file for name in IN_THE_WHEEL for file in sorted(Path("checkpoints", name).iterdir())]
        return [(file, Path(self.build_lib, "metatele", file)) for file in files]


setup(cmdclass={"build_py": BuildWithCheckpoints})
