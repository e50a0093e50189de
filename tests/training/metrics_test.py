import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attention_jax.training import metrics


def row(step: int, loss: float) -> dict[str, float]:
    return {'step': step, 'epoch': step / 2, 'wall_time': 1e9 + step, 'train/loss': loss}


def test_a_restart_leaves_each_step_once(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3, 4):
        writer.write(row(step, 0.5))
    writer.close()
    # Killed in the middle of a line; the checkpoint is of step 2.
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 5, "epo')
    writer = metrics.MetricsWriter(tmp_path, 2)
    for step in (3, 4, 5):
        writer.write(row(step, 0.25))
    writer.close()

    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    expected = [row(1, 0.5), row(2, 0.5), row(3, 0.25), row(4, 0.25), row(5, 0.25)]
    assert [json.loads(line) for line in lines] == expected
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = {e.step: e.value for e in events.Scalars('train/loss')}
    assert scalars == {1: 0.5, 2: 0.5, 3: 0.25, 4: 0.25, 5: 0.25}
    assert len(events.Scalars('train/loss')) == 5


def test_environment_names_versions_and_devices():
    environment = metrics.environment()
    assert environment['devices']['count'] == 8
    assert environment['versions']['jax']
