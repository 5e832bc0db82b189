"""The load generator: keep-alive connections, request bytes made beforehand, answers read but not parsed.

`python load.py PORT` is the other end of its self-check: a server that answers anything at once.
"""
import asyncio
import random
import sys
import time

CONNECTIONS = 64  # of the open loop; a backlog beyond them still counts from its intended time
LATE = 60  # seconds that a phase may take beyond its own length


def request(path, body):
    head = (f"POST {path} HTTP/1.1", "host: bench", "content-type: application/json", f"content-length: {len(body)}")
    return "\r\n".join((*head, "", "")).encode() + body


class Connection:
    def __init__(self, port):
        self.port, self.writer = port, None

    async def ask(self, request):
        """The body of the answer; None if it was none of status 200."""
        try:
            if self.writer is None:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            self.writer.write(request)
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            length = head.split(b"\ncontent-length:", 1)[1].split(b"\r", 1)[0]
            body = await self.reader.readexactly(int(length))
            return body if head.split(b" ", 2)[1] == b"200" else None
        except (OSError, EOFError, IndexError):
            self.close()
            return None

    def close(self):
        if self.writer:
            self.writer.close()
        self.writer = None


class Phase:
    """What one phase of load took."""

    def __init__(self):
        self.took, self.errors, self.began, self.ended = [], 0, time.perf_counter(), 0.0

    async def ask(self, connection, request, since):
        body = await connection.ask(request)
        self.ended = time.perf_counter()
        if body is None:
            self.errors += 1
            await asyncio.sleep(0.01)  # a dead server is not to be hammered
        else:
            self.took.append((self.ended - since) * 1e3)
        return body

    def result(self):
        took = sorted(self.took)
        if not took:
            raise OSError(f"no answer, {self.errors} errors")
        at = lambda share: took[min(len(took) - 1, int(share * len(took)))]
        # To the last answer: what was under way at the end is counted, and so is its time.
        rate = len(self.took) / (self.ended - self.began)
        return {"rate": rate, "p50": at(0.5), "p99": at(0.99), "answers": len(self.took), "errors": self.errors}


def run(port, count, client, limit):
    """Runs `client(number, connection, phase)` on so many connections to their end."""

    async def all_of_them():
        phase, connections = Phase(), [Connection(port) for _ in range(count)]
        try:
            clients = [client(number, connection, phase) for number, connection in enumerate(connections)]
            await asyncio.wait_for(asyncio.gather(*clients), limit + LATE)
        finally:
            for connection in connections:
                connection.close()
        return phase.result()

    return asyncio.run(all_of_them())


def closed(port, requests, clients, seconds):
    """Each client asks again as soon as it has its answer; they begin at different texts."""

    async def client(number, connection, phase):
        at = number * len(requests) // clients
        while True:
            now = time.perf_counter()
            if now - phase.began >= seconds:
                return
            await phase.ask(connection, requests[at % len(requests)], now)
            at += 1

    return run(port, clients, client, seconds)


def open_loop(port, requests, rate, seconds, seed):
    """Poisson arrivals at `rate` whatever the answers do; latency counts from the intended time."""
    rng = random.Random(seed)
    due, arrivals = 0.0, []
    while (due := due + rng.expovariate(rate)) < seconds:
        arrivals.append(due)
    arrivals = iter(list(zip(arrivals, (requests[at % len(requests)] for at in range(len(arrivals))))))

    async def client(number, connection, phase):
        # Whoever is free takes the next arrival and waits for its time; the iterator is the queue.
        for due, request in arrivals:
            due += phase.began
            while (left := due - time.perf_counter()) > 0:
                # The event loop's timer is a millisecond coarse: the last stretch is spun.
                await asyncio.sleep(left - 0.002 if left > 0.003 else 0)
            await phase.ask(connection, request, due)

    return run(port, CONNECTIONS, client, seconds)


def answers(port, requests, clients=8):
    """The answer to each request, once."""
    bodies, todo = [None] * len(requests), iter(range(len(requests)))

    async def client(number, connection, phase):
        for at in todo:
            bodies[at] = await phase.ask(connection, requests[at], time.perf_counter())

    run(port, clients, client, 60)
    return bodies


class Stub(asyncio.Protocol):
    ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2048\r\n\r\n" + b"x" * 2048

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(self.ANSWER)


async def stub(port):
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(stub(int(sys.argv[1])))
