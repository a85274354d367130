"""A Python that has imported transformers already: python warm.py SOCKET; then `client`, a file to run in its place.

Importing takes 6 s of processor time, at each recording. Here one process does it once. Whatever is asked of it runs in
a fork, with the arguments, environment, folder, stdout and stderr of whoever asks.
"""
import json
import os
import runpy
import socket
import sys
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    asked = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "big")], [1, 2])
    server.sendall(asked)
    code = int(server.recv(16) or b"1")
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def client(folder: Path) -> Path:
    """Write the file to run, for the server at folder/socket."""
    path = folder / "python"
    path.write_text(CLIENT.format(python=sys.executable, path=str(folder / "socket")))
    path.chmod(0o755)
    return path


def answer(connection: socket.socket):
    """Run what is asked as a program of its own, and tell its exit code."""
    size, files, _, _ = socket.recv_fds(connection, 8, 2)
    asked = b""
    while len(asked) < int.from_bytes(size, "big"):
        asked += connection.recv(1 << 16)
    argv, environment, folder = json.loads(asked)
    if child := os.fork():
        for file in files:
            os.close(file)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(str(code).encode())
        return
    code = 1
    try:
        os.dup2(files[0], 1)
        os.dup2(files[1], 2)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = argv
        sys.path[0] = str(Path(argv[0]).parent)
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(path: str):
    """Import what takes long; then serve, one after the other."""
    import safetensors.torch  # noqa: F401
    from transformers import InternVLForConditionalGeneration, Qwen2Tokenizer  # noqa: F401
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                answer(connection)


if __name__ == "__main__":
    main(sys.argv[1])
