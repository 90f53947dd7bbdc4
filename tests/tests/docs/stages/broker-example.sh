# Another machine, as far as its network goes, into which one comes by ssh.
set -eu
ip netns add broker.example
ip link add lan type veth peer name lan netns broker.example
ip address add 10.97.80.1/24 dev lan
ip link set lan up
ip -n broker.example address add 10.97.80.2/24 dev lan
ip -n broker.example link set lan up
ip -n broker.example link set lo up

mkdir -p /run/sshd /run/ssh
grep -q '^sshd:' /etc/passwd || echo 'sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin' >> /etc/passwd
ssh-keygen -q -t ed25519 -N '' -f /run/ssh/host
ssh-keygen -q -t ed25519 -N '' -f /run/ssh/user
echo "broker.example $(cat /run/ssh/host.pub)" > /run/ssh/known
# Whoever comes stays until it is ended.
cat > /run/ssh/sshd_config << 'END'
HostKey /run/ssh/host
AuthorizedKeysFile /run/ssh/user.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
PidFile none
ForceCommand echo at broker.example: ready; exec sleep infinity
END
cat > /etc/ssh/ssh_config << 'END'
Host broker.example
    IdentityFile /run/ssh/user
    IdentitiesOnly yes
    UserKnownHostsFile /run/ssh/known
END
rm -rf /etc/ssh/ssh_config.d
set +eu
