"""Asks a server's /health all the while, from a process of its own, so that no load generator's delays count.

    python -m benchmarks.server_load.ask_health PORT

Prints "begun" after the first answer, and, when its standard input ends, how many seconds each answer took, as JSON.
"""

import http.client
import json
import sys
import threading
import time


def main() -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
    enough = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), enough.set()), daemon=True).start()
    took: list[float] = []
    while not enough.wait(0.05):
        start = time.monotonic()
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        took.append(time.monotonic() - start)
        if len(took) == 1:
            print("begun", flush=True)
    print(json.dumps(took))


if __name__ == "__main__":
    main()
