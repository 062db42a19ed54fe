"""Runs a script twice, each with a folder of its own, and kills the second once it has a checkpoint; then it goes on."""

import signal
import subprocess
import sys
import time

from safetensors.torch import load_file


def whole_and_killed(script, tmp_path):
    """The folders of the run that was left alone and of the one that was killed and started again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([sys.executable, "-c", script, str(whole)], check=True)
    process = subprocess.Popen([sys.executable, "-c", script, str(killed)])
    checkpoint = killed / "checkpoint.safetensors"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(0.2)  # somewhere later in the run, or while it saves
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"
    load_file(checkpoint)  # whole, whenever the kill came
    subprocess.run([sys.executable, "-c", script, str(killed)], check=True)
    return whole, killed
