# As if the packages that xtask has unpacked (`commands.rs`) were installed, and kubectl with them, on a machine that has been told
# of a registry and of another machine. Variables: SHAPER_COMMANDS, SHAPER_KUBERNETES, REPOSITORY.
set -eu
mount -t overlay -o "lowerdir=$SHAPER_COMMANDS/usr:/usr" none /usr
cp -an "$SHAPER_COMMANDS/etc/." /etc/
ln -s "$SHAPER_KUBERNETES/kubectl" /run/bin/kubectl
printf '127.0.0.1 registry.example authority.example\n10.97.80.2 broker.example\n' >> /etc/hosts
ln -s "$REPOSITORY/target" target
ln -s "$REPOSITORY/deploy" deploy
export PYTHONDONTWRITEBYTECODE=1
set +eu
