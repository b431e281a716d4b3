"""Code that its caller does not trust, on the cluster: it runs in the sandbox alone, and what comes of it is data."""

import json

from live import LiveCluster

PRELUDE = """
import json, os, pickle, sys
from pathlib import Path
from delegate_function import (
    DelegateFunctionException, DelegateGenerator, Executor, SandboxDelegate, SlurmDelegate, SourceCode
)

def opened(*arguments, **keywords):
    raise AssertionError("a pickle was opened")

pickle.loads = pickle.load = pickle.Unpickler = opened
sandbox = SlurmDelegate(SandboxDelegate())
said = {}
"""

SUBMISSION = '''
import os, sys
import numpy as np
import pandas as pd

def measured(sizes):
    print("\\x1b[31mred\\x1b[0m", "\\x1b]0;title\\x07")
    table = pd.DataFrame({"size": sizes, "name": [str(size) for size in sizes]}).set_index("size")
    return {"uid": os.getuid(), "array": np.arange(3) / 2, "table": table, "whole": 2**70, "tuple": (1, None)}

class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/opened-by-the-caller",)

def evil():
    return {"list": [1, Evil()]}

def forged():
    """Send a result of its own making, with a pickle in it, by all descriptors."""
    import pickle
    from delegate_function import frames
    content = pickle.dumps(Evil())
    header = frames.encode_json(frames.RESULT, {"parts": [{"kind": "value", "size": len(content)}]})
    for fd in range(3, 30):
        try:
            os.write(fd, header + frames.encode(frames.DATA, content) + frames.encode(frames.END))
        except OSError:
            continue
    sys.stdout.flush()
    os._exit(0)

def wrong():
    raise ValueError("\\x1b[2Jgone")
'''

PROGRAM = """
Path("ada.py").write_text(SUBMISSION)
ada = SourceCode(file="ada.py")
value = ada.call(sandbox, "measured", [10, 20])
said["value"] = [value["uid"], value["array"].tolist(), value["whole"] == 2**70, value["tuple"] == (1, None)]
said["table"] = value["table"].reset_index().to_dict("list")

def refused(function):
    try:
        return function()
    except DelegateFunctionException as error:
        return [type(error).__name__, str(error), str(error.__cause__)]

for name in ("evil", "forged", "wrong"):
    said[name] = refused(lambda: ada.call(sandbox, name))
chain = DelegateGenerator(
    yaml="{version: 0.1, sequence: [{type: SlurmDelegate}, {type: SandboxDelegate, results: data}]}"
)
said["yaml"] = refused(lambda: chain.invoke(ada, "run", "evil"))
with Executor(results="data") as executor:
    said["executor"] = executor.submit(ada.run, "measured", [1]).result()["uid"]
said["opened"] = os.path.exists("/tmp/opened-by-the-caller")
Path("ada.py").unlink()
print(json.dumps(said))
"""


def test_a_submission_runs_in_the_sandbox_and_returns_data_alone(cluster: LiveCluster) -> None:
    program = f"{PRELUDE}SUBMISSION = {SUBMISSION!r}\n{PROGRAM}"
    *output, last = cluster.python(program, timeout_s=120).ok().splitlines()
    said = json.loads(last)
    assert output == ["red ", "red "]
    assert said["value"] == [65533, [0.0, 0.5, 1.0], True, True]
    assert said["table"] == {"size": [10, 20], "name": ["10", "20"]}
    assert said["executor"] == 65533
    kind, text, cause = said["wrong"]
    assert kind == "RemoteError"
    assert text.endswith("ValueError: gone")
    assert 'File "ada.py", line 33, in wrong' in cause
    for name in ("evil", "yaml"):
        kind, text, _ = said[name]
        assert kind == "ResultNotReturned"
        assert "result['list'][1] is an Evil;" in text
    kind, text, _ = said["forged"]
    assert kind == "HopFailed"
    assert "sent what does not belong there" in text
    assert not said["opened"]
