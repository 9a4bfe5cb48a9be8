import subprocess
import sys
from pathlib import Path

from experiments import __main__ as listing

FOLDER = Path(listing.__file__).parent


def test_all_that_can_be_run_is_listed():
    """A module that starts something when it is run is a command or a part of one."""
    started = {
        path.stem for path in FOLDER.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()
    }
    assert started - {"__main__", "worker"} == set(listing.COMMANDS)


def test_the_list():
    command = [sys.executable, "-m", "experiments"]
    shown = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    for name in listing.COMMANDS:
        assert f"  {name} " in shown.stdout
        assert len(listing.purpose(name)) > 10
