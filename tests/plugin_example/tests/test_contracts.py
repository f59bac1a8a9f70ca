"""All that a plugin needs to test of what is common to its kind; its own numbers are tested beside that."""

from spin_plugin import CountUpdates, HuberLoss, NoRepeat, ShortAndRight

from spin_lightning.testing import check_callback, check_generator, check_loss, check_reward


def test_the_loss():
    check_loss(HuberLoss(delta=0.5), beta=0.1)


def test_the_generator():
    check_generator(NoRepeat(max_new_tokens=6))


def test_the_reward():
    check_reward(ShortAndRight(length=4))


def test_the_callback():
    check_callback(CountUpdates)
