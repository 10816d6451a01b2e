from rich.table import Table

from dit_accel.cli import common


def test_a_table_wider_than_the_console_stays_whole(monkeypatch, capsys):
    monkeypatch.setattr(common.out, "_width", 40)
    monkeypatch.setattr(common.out, "_height", 25)
    table = Table(title="figures", caption="of a run")
    words = [f"value {column} of a row" for column in range(6)]
    for column in range(6):
        table.add_column(f"heading {column}")
    table.add_row(*words)
    common.print_wide(table)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if all(word in line for word in words)]) == 1
