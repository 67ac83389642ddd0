"""A Cluster whose slots move, Sentinels that fail over, TLS with a password: real processes, under load."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from redis.cluster import key_slot

from slatewise.events.event import Event
from slatewise.events.redis_histories import RedisHistories, history_key
from slatewise.store.client import connect
from slatewise.store.codec import pointer_key, unpack, user_key
from slatewise.store.generations import Generations
from slatewise.store.lookup import RedisStore
from slatewise.store.node import CLOSED, OPEN
from slatewise.store.push import push
from tests.support.fault_proxy import fault_proxy
from tests.support.network import free_port
from tests.support.redis_binary import redis_binary
from tests.support.redis_server import redis_command
from tests.support.store_load import DIM, RANKER, USERS, check, circuit, fill, loaded, until, until_closed, vectors_of

BUDGET = 0.25  # seconds
SLACK = 1.0
SLOTS = 16_384


def wait_for(condition: Callable[[], Any], patience: float = 30.0) -> None:
    give_up = time.monotonic() + patience
    while True:
        try:
            if condition():
                return
        except redis.RedisError:
            pass
        assert time.monotonic() < give_up, "the condition did not become true"
        time.sleep(0.05)


@contextmanager
def redis_process(folder: Path, *options: str, sentinel: bool = False) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A redis-server on loopback without persistence; its port and process."""
    port = free_port()
    home = folder / str(port)
    home.mkdir()
    if sentinel:
        (home / "sentinel.conf").write_text("\n".join([f"port {port}", "bind 127.0.0.1", f"dir {home}", *options, ""]))
        command = [redis_binary(), str(home / "sentinel.conf"), "--sentinel"]
    else:
        command = redis_command(home, port, *options)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port) as client:
            wait_for(client.ping)
        yield port, process
    finally:
        process.kill()
        process.wait()


# Cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[redis.Redis]]:
    """Three primaries with a third of the slots each; a client of each node."""
    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        options = ("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-node-timeout", "2000")
        ports = [stack.enter_context(low_port(folder, *options)) for _ in range(3)]
        nodes = [stack.enter_context(redis.Redis(port=port)) for port in ports]
        for k, node in enumerate(nodes):
            node.execute_command("CLUSTER ADDSLOTS", *range(k * SLOTS // 3, (k + 1) * SLOTS // 3))
            node.execute_command("CLUSTER SET-CONFIG-EPOCH", k + 1)
        for port in ports[1:]:
            nodes[0].execute_command("CLUSTER MEET", "127.0.0.1", port)
        for node in nodes:
            wait_for(
                lambda node=node: (
                    {"cluster_state": "ok", "cluster_known_nodes": "3"}.items()
                    <= node.execute_command("CLUSTER INFO").items()
                )
            )
        yield nodes


@contextmanager
def low_port(folder: Path, *options: str) -> Iterator[int]:
    """A server with a port below 55,536: the nodes of a Cluster talk on port plus 10,000."""
    for _ in range(200):
        port = free_port()
        if port + 10_000 > 65_535:
            port -= 20_000
        home = folder / str(port)
        home.mkdir(exist_ok=True)
        command = redis_command(home, port, *options)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with redis.Redis(port=port) as client:
                wait_for(lambda process=process, client=client: process.poll() is not None or client.ping())
            if process.poll() is None:
                yield port
                return
        finally:
            process.kill()
            process.wait()
    pytest.fail("no free port")


def cluster_url(nodes: list[redis.Redis]) -> str:
    return "redis+cluster://" + ",".join(
        f"127.0.0.1:{node.connection_pool.connection_kwargs['port']}" for node in nodes
    )


def emptied(nodes: list[redis.Redis]) -> None:
    for node in nodes:
        node.flushall()


def move(slot: int, source: redis.Redis, target: redis.Redis, others: list[redis.Redis], pause: float = 0.0) -> None:
    """Move a slot as redis-cli does: clients are sent ASK during the move, MOVED after it."""
    ids = {node: node.execute_command("CLUSTER MYID").decode() for node in (source, target)}
    port = target.connection_pool.connection_kwargs["port"]
    target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
    source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
    time.sleep(pause)
    while keys := source.execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
        source.execute_command("MIGRATE", "127.0.0.1", port, "", 0, 5_000, "KEYS", *keys)
        time.sleep(pause)
    for node in (target, source, *others):
        node.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])


def owner(nodes: list[redis.Redis], slot: int) -> redis.Redis:
    for node in nodes:
        me = node.execute_command("CLUSTER MYID").decode()
        for start, end, primary, *_ in node.execute_command("CLUSTER SLOTS"):
            if start <= slot <= end and primary[2].decode() == me:
                return node
    raise AssertionError


def test_moving_slots_of_a_cluster_loses_no_look_up(cluster: list[redis.Redis]) -> None:
    emptied(cluster)
    with connect(cluster_url(cluster[:1])) as client:
        fill(client)
    slots = sorted({key_slot(user_key("r", "s", str(user)).encode()) for user in range(USERS)})
    assert len({owner(cluster, slot).connection_pool.connection_kwargs["port"] for slot in slots}) == 3, (
        "every node holds users"
    )

    async def main() -> None:
        async with RedisStore(cluster_url(cluster), 5.0, lambda: [RANKER]) as store:
            await until_closed(store)
            async with loaded(store) as load:
                await asyncio.sleep(0.3)
                for slot in slots[:: len(slots) // 12]:
                    source = owner(cluster, slot)
                    target, *others = [node for node in cluster if node is not source]
                    await asyncio.to_thread(move, slot, source, target, others, 0.05)
                pointer = key_slot(pointer_key("r", "s").encode())
                source = owner(cluster, pointer)
                target, *others = [node for node in cluster if node is not source]
                await asyncio.to_thread(move, pointer, source, target, others)
                await asyncio.sleep(1.5)
            assert set(load.since(0.0)) == {"hit"} and len(load.answers) > 200
            assert circuit(store) == CLOSED

    asyncio.run(main())


def test_moving_slots_of_a_cluster_lose_no_event(cluster: list[redis.Redis]) -> None:
    emptied(cluster)
    users = [str(user) for user in range(60)]
    with connect(cluster_url(cluster[:1])) as client:
        fill(client)

    async def main() -> None:
        async with RedisStore(cluster_url(cluster), 5.0, lambda: [RANKER]) as store:
            await until_closed(store)
            histories = RedisHistories(store, 1_000, 0.0)
            letters = ""
            slots = sorted({key_slot(history_key(user).encode()) for user in users})
            for turn, slot in enumerate(slots[:6]):
                source = owner(cluster, slot)
                target, *others = [node for node in cluster if node is not source]
                moving = asyncio.ensure_future(asyncio.to_thread(move, slot, source, target, others, 0.05))
                events = [Event(user, f"i{turn}", "", 1.0 + turn, "", "") for user in users]
                answer = await histories.write([(event, time.time()) for event in events])
                await moving
                failed = [event for event, letter in zip(events, answer, strict=True) if letter == "F"]
                answer += await histories.write([(event, time.time()) for event in failed])
                letters += answer
            found = await asyncio.gather(*(histories.read(user, 100) for user in users))
            assert all(each.history and len(each.history.item_ids) == 6 for each in found)
            await histories.delete(users[0])
            await store.delete_user(users[0])
            assert (await histories.read(users[0], 100)).history is None
            assert (await store.look_up(RANKER, users[0])).status == "default"

    asyncio.run(main())


def test_every_operation_of_the_writer_works_on_a_cluster(cluster: list[redis.Redis]) -> None:
    emptied(cluster)
    with connect(cluster_url(cluster)) as client:
        store = Generations(client, "r", "s", ttl_days=1)
        users = [str(user) for user in range(USERS)]
        for generation in range(1, 5):
            assert push(store, users, vectors_of(generation))["generation"] == generation
        with store.begin("incremental", full=False) as writing:
            store.write_chunk(5, 0, users[:10], vectors_of(5)[:10], 5.0)
            assert store.publish(writing, 1) == [5, 4, 3]
        assert store.roll_back() == [4, 3]
        assert store.merge() == [6, 4, 3]
        assert store.delete_user("7")
        push(store, users, vectors_of(7))
        assert store.sweep(0.0) > 0
        assert store.status()["live"] == [7, 6, 4] and store.status()["deleted_users"] == 1
        for user in (0, 8, 299):
            fields = client.hgetall(user_key("r", "s", str(user)))
            assert set(fields) == {b"7", b"6", b"4"}
            assert unpack(fields[b"6"], DIM)[0][:2].tolist() == [user, 4]
        assert set(client.hgetall(user_key("r", "s", "7"))) == {b"7"}


def test_a_hung_cluster_node_affects_only_its_own_users(
    cluster: list[redis.Redis],
) -> None:
    emptied(cluster)
    with connect(cluster_url(cluster)) as client:
        fill(client)
    pointer = owner(cluster, key_slot(pointer_key("r", "s").encode()))
    still = next(node for node in cluster if node is not pointer)
    users = list(map(str, range(0, USERS, 10)))
    mine = {user for user in users if owner(cluster, key_slot(user_key("r", "s", user).encode())) is still}
    assert 0 < len(mine) < len(users)

    async def main() -> None:
        async with RedisStore(cluster_url(cluster), 0.1, lambda: [RANKER]) as store:

            async def ask_all() -> dict[str, str]:
                found = await asyncio.gather(*(store.look_up(RANKER, user) for user in users))
                for user, each in zip(users, found, strict=True):
                    check(user, each)
                return {user: each.status for user, each in zip(users, found, strict=True)}

            async def until_all_hit() -> None:
                async with asyncio.timeout(10):
                    while set((await ask_all()).values()) != {"hit"}:  # noqa: ASYNC110
                        await asyncio.sleep(0.1)

            await until_all_hit()
            pid = int(still.info("server")["process_id"])
            os.kill(pid, signal.SIGSTOP)
            try:
                begin = time.perf_counter()
                statuses = []
                while time.perf_counter() - begin < 1.5:  # the other nodes take longer to notice
                    statuses.append(await ask_all())
                    await asyncio.sleep(0.02)
            finally:
                os.kill(pid, signal.SIGCONT)
            assert all(each[user] == "error" for each in statuses for user in mine)
            others = [each[user] for each in statuses for user in users if user not in mine]
            assert others.count("hit") > 0.9 * len(others)
            assert sum(node.circuit != CLOSED for node in store.nodes.values()) == 1
            await until_all_hit()

    asyncio.run(main())


# Sentinel


def test_a_fail_over_takes_seconds_and_gives_no_wrong_vector(tmp_path: Path) -> None:
    with ExitStack() as stack:
        port, process = stack.enter_context(redis_process(tmp_path))
        replica, _ = stack.enter_context(redis_process(tmp_path, "--replicaof", "127.0.0.1", str(port)))
        rules = (
            f"sentinel monitor main 127.0.0.1 {port} 2",
            "sentinel down-after-milliseconds main 700",
            "sentinel failover-timeout main 5000",
        )
        sentinels = [stack.enter_context(redis_process(tmp_path, *rules, sentinel=True))[0] for _ in range(3)]
        watcher = stack.enter_context(redis.Redis(port=sentinels[0]))
        wait_for(
            lambda: (
                {watcher.sentinel_masters()["main"][name] for name in ("num-slaves",)} == {1}
                and watcher.sentinel_masters()["main"]["num-other-sentinels"] == 2
            )
        )
        url = f"redis+sentinel://{','.join(f'127.0.0.1:{each}' for each in sentinels)}/main/0"
        with connect(url) as client:
            fill(client)
            client.wait(1, 5_000)

        async def main() -> None:
            async with RedisStore(url, BUDGET, lambda: [RANKER]) as store:
                await until_closed(store)
                async with loaded(store) as load:
                    await asyncio.sleep(0.5)
                    assert set(load.since(0.0)) == {"hit"}
                    histories = RedisHistories(store, 100, 0.0)
                    event = Event("5", "before", "", 1.0, "", "")
                    assert await histories.write([(event, time.time())]) == "N"
                    await asyncio.sleep(0.2)  # until the replica has it
                    process.kill()
                    await until(lambda: circuit(store) == OPEN, 3.0)
                    assert (await histories.read("5", 10)).fault
                    assert await histories.write([(event._replace(item_id="during"), time.time())]) == "F"
                    await until_closed(store, 30.0)
                    async with asyncio.timeout(10):
                        while await histories.write([(event._replace(item_id="after"), time.time())]) == "F":  # noqa: ASYNC110
                            await asyncio.sleep(0.1)
                    found_history = (await histories.read("5", 10)).history
                    assert found_history is not None
                    assert found_history.item_ids == ["before", "after"]
                    back = time.perf_counter()
                    await asyncio.sleep(0.5)
                assert load.since(back)["hit"] > 10 and "default" not in load.since(0.0)
                assert load.longest < BUDGET + SLACK
                with connect(url) as client:
                    assert client.connection_pool.get_master_address()[1] == replica
                    assert fill(client) == 2
                await until(lambda: store.poller.spaces["r", "s"].live.generations == ["2", "1"], 5.0)
                found = await store.look_up(RANKER, "5")
                check("5", found)
                assert found.version == "2"

        asyncio.run(main())


# TLS, with a password


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def tls_context(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*names).configure_cert(context)
    return context


def test_tls_with_a_password_serves_under_load(tmp_path: Path, authority: trustme.CA) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    async def main() -> None:
        with redis_process_with_password(tmp_path) as port:
            async with fault_proxy(port, tls=tls_context(authority, "127.0.0.1")) as proxy:
                url = f"rediss://:p%40ss@127.0.0.1:{proxy.port}/0?ssl_ca_certs={tmp_path / 'ca.pem'}"
                await asyncio.to_thread(fill_at, url)
                async with RedisStore(url, BUDGET, lambda: [RANKER]) as store:
                    await until_closed(store)
                    async with loaded(store) as load:
                        await asyncio.sleep(0.7)
                        proxy.reset_all()
                        await asyncio.sleep(0.7)
                    assert load.since(0.0)["hit"] > 0.9 * len(load.answers) and circuit(store) == CLOSED
                    assert load.longest < BUDGET + SLACK
                for wrong in (
                    url.replace("p%40ss", "wrong"),
                    url.replace("127.0.0.1", "localhost"),
                    f"rediss://:p%40ss@127.0.0.1:{proxy.port}/0",
                ):
                    async with RedisStore(
                        wrong, BUDGET, lambda: [RANKER]
                    ) as store:  # a wrong password, a wrong host name, no trusted authority
                        assert (await store.look_up(RANKER, "1")).status == "error"

    asyncio.run(main())


def fill_at(url: str) -> None:
    with connect(url) as client:
        fill(client)


def assert_served(url: str) -> None:
    async def main() -> None:
        async with RedisStore(url, BUDGET, lambda: [RANKER]) as store:
            await until_closed(store)
            assert (await store.look_up(RANKER, "1")).status == "hit"

    asyncio.run(main())


@contextmanager
def redis_process_with_password(folder: Path) -> Iterator[int]:
    with redis_process(folder) as (port, _), redis.Redis(port=port) as client:
        client.config_set("requirepass", "p@ss")
        yield port


def test_sentinels_with_a_password_on_the_server_are_reached(tmp_path: Path) -> None:
    """The sentinels have no password, the server has one."""
    with (
        redis_process_with_password(tmp_path) as port,
        redis_process(
            tmp_path, f"sentinel monitor main 127.0.0.1 {port} 1", "sentinel auth-pass main p@ss", sentinel=True
        ) as (
            sentinel,
            _,
        ),
    ):
        url = f"redis+sentinel://:p%40ss@127.0.0.1:{sentinel}/main/0"
        with redis.Redis(port=sentinel) as watcher:
            wait_for(lambda: watcher.sentinel_masters()["main"]["flags"] == "master")
        fill_at(url)
        assert_served(url)


def test_a_unix_socket_is_reached(tmp_path: Path) -> None:
    with redis_process(tmp_path, "--unixsocket", str(tmp_path / "redis.sock")):
        url = f"unix://{tmp_path / 'redis.sock'}?db=3"
        fill_at(url)
        assert_served(url)
