{{- define "slatewise.fullname" -}}
{{- if contains "slatewise" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-slatewise" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{- define "slatewise.selector" -}}
app.kubernetes.io/name: slatewise
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "slatewise.labels" -}}
app.kubernetes.io/name: slatewise
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "slatewise.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "slatewise.fullname" .) }}{{ else }}{{ .Values.serviceAccount.name | default "default" }}{{ end -}}
{{- end }}

{{- define "slatewise.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "slatewise.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- /* A probe of a path. Mutual TLS: kubelet has no certificate, so the health check of the image asks /readyz. */ -}}
{{- define "slatewise.probe" -}}
{{- if and .root.Values.tls.secretName .root.Values.tls.clientCertificates -}}
exec: {command: [python, -I, -S, health_check.py{{ if eq .path "/livez" }}, /livez{{ end }}]}
{{- else -}}
httpGet: {path: {{ .path }}, port: http{{ if .root.Values.tls.secretName }}, scheme: HTTPS{{ end }}}
{{- end }}
{{- end }}

{{- /* Faults that the schema cannot express. */ -}}
{{- define "slatewise.check" -}}
{{- if and .Values.autoscaling.enabled .Values.keda.enabled }}{{ fail "autoscaling.enabled and keda.enabled exclude each other: KEDA makes its own HPA" }}{{ end -}}
{{- range $section := list .Values.autoscaling .Values.keda }}
{{- if and $section.enabled (gt (int $section.minReplicas) (int $section.maxReplicas)) }}{{ fail "minReplicas must not be above maxReplicas" }}{{ end -}}
{{- end }}
{{- if and .Values.keda.enabled (not .Values.keda.prometheus) }}{{ fail "keda.enabled needs keda.prometheus, the address of Prometheus" }}{{ end -}}
{{- $least := int .Values.replicas -}}
{{- if .Values.autoscaling.enabled }}{{ $least = int .Values.autoscaling.minReplicas }}{{ end -}}
{{- if .Values.keda.enabled }}{{ $least = int .Values.keda.minReplicas }}{{ end -}}
{{- if and .Values.pdb.enabled (ge (int .Values.pdb.minAvailable) $least) }}{{ fail (printf "pdb.minAvailable must be less than the %d replicas, or no node can be drained; set pdb.enabled to false for a single replica" $least) }}{{ end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}{{ fail "ingress.enabled needs ingress.hosts" }}{{ end -}}
{{- if and .Values.gateway.enabled (not .Values.gateway.parentRefs) }}{{ fail "gateway.enabled needs gateway.parentRefs" }}{{ end -}}
{{- if and .Values.tls.clientCertificates (not .Values.tls.secretName) }}{{ fail "tls.clientCertificates needs tls.secretName" }}{{ end -}}
{{- if and .Values.bundles.initContainers (not .Values.bundles.volume) }}{{ fail "bundles.initContainers need bundles.volume, for example emptyDir: {}" }}{{ end -}}
{{- if .Values.refresh.enabled }}
{{- if not .Values.refresh.image }}{{ fail "refresh.enabled needs refresh.image, an image with the training install" }}{{ end -}}
{{- if not .Values.secrets.redis_url }}{{ fail "refresh.enabled needs secrets.redis_url: it publishes the vectors to Redis" }}{{ end -}}
{{- end }}
{{- if .Values.update.enabled }}
{{- if not .Values.update.image }}{{ fail "update.enabled needs update.image, an image with the training install" }}{{ end -}}
{{- if not .Values.bundles.volume }}{{ fail "update.enabled needs bundles.volume: the servers read the new versions there" }}{{ end -}}
{{- end }}
{{- range $name, $_ := .Values.settings }}
{{- if hasKey $.Values.secrets $name }}{{ fail (printf "%s is in settings and in secrets" $name) }}{{ end -}}
{{- end }}
{{- if and .Values.settings.capture_file (not .Values.secrets.capture_key) }}{{ fail "settings.capture_file needs secrets.capture_key" }}{{ end -}}
{{- end }}
