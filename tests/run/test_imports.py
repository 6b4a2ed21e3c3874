"""What a process imports before it does anything: seconds of each, and of each rank."""

import subprocess
import sys

COMMANDS = "api, run.evaluate, run.export, run.finetune, run.generate, run.knn, run.pretrain, run.report"


def test_commands_start_without_the_compiler_and_timm():
    """torch.compile's modules take 2 CPU s, 7 without bytecode; timm imports them, too."""
    names = [f"mug.{name}" for name in [*COMMANDS.split(", "), "run.evaluators.knn"]]
    code = f"import sys, {', '.join(names)}; print(sorted({{'timm', 'torch._dynamo'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
