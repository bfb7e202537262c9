"""Progress where there is no terminal: a line now and then, with an estimate that is not made up."""

from export import cli_progress


def lines(monkeypatch, capsys, told):
    """What is printed for steps `(seconds, what, done, total)`."""
    now = [0.0]
    monkeypatch.setattr(cli_progress.time, "monotonic", lambda: 1000.0 + now[0])
    with cli_progress.bar() as tell:
        for now[0], *step in told:
            tell(*step)
    return capsys.readouterr().err.splitlines()


def test_lines_with_an_estimate(monkeypatch, capsys):
    steps = [(60.0 * i, "collecting", i, 10) for i in range(11)]
    printed = lines(monkeypatch, capsys, steps)
    assert printed[0] == "collecting: 0 of 10"
    assert printed[4] == "collecting: 4 of 10, about 6 min left"


def test_not_more_than_a_line_in_a_while(monkeypatch, capsys):
    assert len(lines(monkeypatch, capsys, [(float(i), "collecting", i, 90) for i in range(90)])) == 3


def test_the_next_thing_is_estimated_by_itself(monkeypatch, capsys):
    steps = [
        (0.0, "collecting", 0, 4),
        (400.0, "collecting", 4, 4),
        (430.0, "checking", 0, 6),
        (490.0, "checking", 1, 6),
    ]
    printed = lines(monkeypatch, capsys, steps)
    assert printed[-1] == "checking: 1 of 6, about 5 min left"
