"""What every Lightning run of the suite shares: checkpoints that survive a kill, progress, the loss curve."""
