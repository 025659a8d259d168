"""Result files hold several devices' rows beside one another."""

from bench.measure import read_csv, where, write_csv


def test_a_new_measurement_replaces_this_devices_rows_alone(tmp_path):
    path, here = tmp_path / "found.csv", where()["device"]
    path.write_text(f'variant,ms,device\nours,7,another\nours,8,"{here}"\n')
    write_csv("found", [{"variant": "ours", "ms": 5, "peak_mb": 3}], path)
    rows = read_csv(path)
    assert [(r["ms"], r["device"]) for r in rows] == [("7", "another"), ("5", here)]
    assert [r["peak_mb"] for r in rows] == ["", "3"]
    assert read_csv(tmp_path / "none.csv") == []
