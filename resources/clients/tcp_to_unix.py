"""Passes connections to a port of the loopback on to a unix socket; prints the port.

usage: tcp_to_unix.py SOCKET
"""

import asyncio
import sys


async def copy(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def main():
    async def joined(reader, writer):
        theirs, ours = await asyncio.open_unix_connection(sys.argv[1])
        await asyncio.gather(copy(reader, ours), copy(theirs, writer))

    server = await asyncio.start_server(joined, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
