import json
import stat

import pytest

from attention_jax import files


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path):
    path = tmp_path / 'x.json'
    files.write_json(path, {'a': 1})
    assert json.loads(path.read_text()) == {'a': 1}
    path.chmod(0o640)
    files.write_text(path, 'ä')
    assert path.read_bytes() == 'ä'.encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ['x.json']


def test_what_fails_leaves_all_as_it_was(tmp_path):
    path = tmp_path / 'x.txt'
    path.write_text('old')

    def write():
        with files.replacing(path) as new:
            new.write_text('half')
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert path.read_text() == 'old'
    assert [p.name for p in tmp_path.iterdir()] == ['x.txt']


def test_check_folder(tmp_path):
    files.check_folder('--json', None)
    files.check_folder('--json', tmp_path / 'x.json')
    with pytest.raises(ValueError, match=r'^--json .*no/x\.json: there is no folder .*no$'):
        files.check_folder('--json', tmp_path / 'no' / 'x.json')
