"""`make demo`, or `python -m examples.demo`: what stops it is caught before anything that takes time is imported."""

from concurrent.futures import ThreadPoolExecutor

from nextvid.stopping import stoppable


def main() -> None:
    """Entry point of the demo. A thread makes it: in the main thread Dagster sets handlers of signals of its own."""
    stoppable("what is made is kept: `make demo` goes on from there")
    from examples.demo.run import run_demo

    with ThreadPoolExecutor(1, "demo") as thread:
        thread.submit(run_demo).result()


if __name__ == "__main__":
    main()
