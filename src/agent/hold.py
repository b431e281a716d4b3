"""Hold a container in a job: what a step of the job runs, as the user who owns it, for as long as the container runs.

Nothing here has a right that the user lacks. Only the standard library is used.
"""

from __future__ import annotations

import _socket as socket
import posix as os
import sys
import time

from agent import wire

_PATIENCE_S = 30.0
_RETRY_S = 0.5


def main() -> None:
    """Ask for the container that the arguments name.

    They are: user, name, image ("" if it must be there already), and how many ports it gets.
    """
    user, name, image, ports = sys.argv[1:5]
    job = int(os.environ[b"SLURM_JOB_ID"])
    sys.exit(hold(job=job, user=user, name=name, image=image, ports=int(ports)))


def hold(*, job: int, user: str, name: str, image: str, ports: int = 0, socket_path: str = wire.SOCKET) -> int:
    """Hold a container until it ends; return its exit status, 0 where its owner stopped it.

    An agent that is restarted is waited for: the container goes on meanwhile.
    """
    request = {"v": wire.VERSION, "type": "container", "job": job}
    request |= {"user": user, "name": name, "image": image, "ports": ports}
    again = False
    patient_until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            with_agent = _connected(socket_path)
            wire.send(with_agent, {**request, "again": again})
            while True:
                message, _ = wire.receive(with_agent)
                if message["type"] == "running":
                    again, patient_until = True, 0.0
                elif message["type"] == "refused":
                    print(message["message"], file=sys.stderr)
                    return 1
                else:
                    status = message["status"]
                    return 1 if status is None else int(status)
        except (OSError, EOFError) as error:
            now = time.monotonic()
            patient_until = patient_until or now + _PATIENCE_S
            if now > patient_until:
                print(f"this machine's agent does not answer: {error}", file=sys.stderr)
                return 1
            time.sleep(_RETRY_S)


def _connected(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection
