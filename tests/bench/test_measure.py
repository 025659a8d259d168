"""Result files hold several devices' rows beside one another."""

from bench.measure import interleaved, read_csv, where, write_csv


def test_a_new_measurement_replaces_this_devices_rows_alone(tmp_path):
    path, here = tmp_path / "found.csv", where()["device"]
    path.write_text(f'variant,ms,device\nours,7,another\nours,8,"{here}"\n')
    write_csv("found", [{"variant": "ours", "ms": 5, "peak_mb": 3}], path)
    rows = read_csv(path)
    assert [(r["ms"], r["device"]) for r in rows] == [("7", "another"), ("5", here)]
    assert [r["peak_mb"] for r in rows] == ["", "3"]
    assert read_csv(tmp_path / "none.csv") == []


def test_variants_run_in_turns_forwards_and_backwards():
    """Nobody always comes after the same one."""
    ran = []
    runs = {name: lambda name=name: ran.append(name) for name in "abc"}
    times = interleaved(runs, rounds=3, warm_up=1)
    assert "".join(ran) == "abccbaabccba"
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3, "c": 3}
